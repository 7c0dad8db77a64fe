//! Gives the shared library a name with the ABI version in it, so that a program finds the one that it was linked with.

include!("src/abi.rs");

fn main() {
    println!("cargo:rerun-if-changed=src/abi.rs");
    let name = match std::env::var("CARGO_CFG_TARGET_OS").as_deref() {
        Ok("linux") => format!("-soname,libbatchnorm_c.so.{BN_ABI_VERSION}"),
        Ok("macos") => format!("-install_name,@rpath/libbatchnorm_c.{BN_ABI_VERSION}.dylib"),
        _ => return,
    };
    println!("cargo:rustc-cdylib-link-arg=-Wl,{name}");
}
