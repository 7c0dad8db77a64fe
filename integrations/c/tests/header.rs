//! The committed header is the one that cbindgen makes of the sources. `BATCHNORM_WRITE_HEADER=1` writes it.

use std::fs;
use std::path::Path;

#[test]
fn the_header_is_current() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(here.join("cbindgen.toml")).unwrap();
    // The files are named, so that cbindgen asks cargo nothing.
    let sources = ["abi", "status", "options", "plan", "saved", "whole", "halves"];
    let builder = sources.iter().fold(cbindgen::Builder::new().with_config(config), |builder, source| {
        builder.with_src(here.join(format!("src/{source}.rs")))
    });
    let mut made = Vec::new();
    builder.generate().unwrap().write(&mut made);
    let path = here.join("include/batchnorm.h");
    if std::env::var_os("BATCHNORM_WRITE_HEADER").is_some() {
        fs::write(&path, &made).unwrap();
    }
    let committed = fs::read(&path).unwrap_or_default();
    assert!(committed == made, "include/batchnorm.h is not what cbindgen makes: BATCHNORM_WRITE_HEADER=1 writes it");
}
