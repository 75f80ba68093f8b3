//! A hub's list of a repository's files. What is wanted of it has a place below a folder.

#![no_main]

use std::path::{Component, Path};

use candor::source::{Kind, Listing, Source};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(listing) = Listing::parse(bytes) else { return };
    let files = listing.files();
    for (source, kind) in [("hf:org/name", Kind::Model), ("hf:org/name", Kind::Data), ("hf:org/name/data", Kind::Data)]
    {
        let Source::Hub(address) = Source::parse(source).expect("it is well-formed") else { continue };
        for file in address.wanted(kind, &files).unwrap_or_default() {
            let below = |part| matches!(part, Component::Normal(_));
            assert!(!file.is_empty() && Path::new(file).components().all(below), "{file:?}");
        }
    }
});
