//! The `candor` program: the engine with the built-in environments.

fn main() -> std::process::ExitCode {
    candor::cli::run(&[])
}
