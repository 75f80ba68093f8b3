//! What the targets share: a folder with the input in a file, for readers that take a path.

use tempfile::TempDir;

/// A folder with these files, gone when dropped.
pub fn folder_with(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().expect("there is room for a temporary folder");
    for (name, bytes) in files {
        std::fs::write(folder.path().join(name), bytes).expect("there is room for a small file");
    }
    folder
}
