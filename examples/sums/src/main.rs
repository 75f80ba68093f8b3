//! Candor with one more environment. `cargo run --release -p sums -- train examples/sums/sums.toml`

mod sums;

fn main() -> std::process::ExitCode {
    candor::cli::run(&[("sums", sums::load)])
}
