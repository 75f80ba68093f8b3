//! What the targets share: a folder with the input in a file, for readers that take a path.

use tempfile::TempDir;

/// A folder with these files, also in folders of it, gone when dropped.
pub fn folder_with(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().expect("there is room for a temporary folder");
    for (name, bytes) in files {
        let path = folder.path().join(name);
        path.parent().map(std::fs::create_dir_all).transpose().expect("there is room for a folder");
        std::fs::write(path, bytes).expect("there is room for a small file");
    }
    folder
}
