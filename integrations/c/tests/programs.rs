//! C programs against the installed library, shared and static, with the flags of pkg-config; and the header as C and C++.
//!
//! `BATCHNORM_C_RUNNER` goes before each program, for instance "valgrind -q --error-exitcode=9", and
//! `BATCHNORM_C_FLAGS` into each compilation, for instance "-g -fsanitize=address".
#![cfg(unix)]

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use tempfile::TempDir;

const HERE: &str = env!("CARGO_MANIFEST_DIR");
const STRICT: [&str; 4] = ["-Wall", "-Wextra", "-Werror", "-pedantic"];

/// Runs a command that must succeed without a word on stderr, and gives what it printed.
#[track_caller]
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && error.is_empty(), "{command:?}: {}\n{error}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// Words of an environment variable.
fn words(name: &str) -> Vec<String> {
    std::env::var(name).unwrap_or_default().split_whitespace().map(str::to_owned).collect()
}

/// A folder with the library, as this test was built.
fn prefix() -> &'static Path {
    static PREFIX: OnceLock<TempDir> = OnceLock::new();
    let install = || {
        let folder = tempfile::tempdir().unwrap();
        // target/debug/deps/programs-...
        let test = std::env::current_exe().unwrap();
        let built = test.ancestors().nth(2).unwrap();
        let profile = match built.file_name().and_then(OsStr::to_str) {
            Some("debug") => "dev",
            Some(profile) => profile,
            None => panic!("no profile in {test:?}"),
        };
        let install = Path::new(HERE).join("install.sh");
        // Cargo may have something to say.
        let mut install = Command::new(install);
        install.arg(folder.path()).arg(profile).env("CARGO_TARGET_DIR", built.parent().unwrap());
        assert!(install.status().unwrap().success(), "{install:?}");
        folder
    };
    PREFIX.get_or_init(install).path()
}

/// What pkg-config says of the installed library.
fn pkg_config(question: &[&str]) -> Vec<String> {
    let answer = run(Command::new("pkg-config")
        .args(question)
        .arg("batchnorm")
        .env("PKG_CONFIG_PATH", prefix().join("lib/pkgconfig")));
    answer.split_whitespace().map(str::to_owned).collect()
}

/// Compiles a program and runs it.
fn compile_and_run(source: &str, name: &str, link: &[String]) -> String {
    let program = prefix().join(name);
    run(Command::new("cc")
        .args(["-std=c11", "-O1"])
        .args(STRICT)
        .args(words("BATCHNORM_C_FLAGS"))
        .arg(concat!("-DEXPECTED_VERSION=\"", env!("CARGO_PKG_VERSION"), "\""))
        .args(pkg_config(&["--cflags"]))
        .arg(Path::new(HERE).join(source))
        .arg("-o")
        .arg(&program)
        .args(link)
        .args(["-lm", "-lpthread"]));
    let runner = words("BATCHNORM_C_RUNNER");
    let mut command = Command::new(runner.first().map_or(program.as_os_str(), OsStr::new));
    if !runner.is_empty() {
        command.args(&runner[1..]).arg(&program);
    }
    // Set to the folder where the runtime linker finds the library, here and on macOS.
    let folder = prefix().join("lib");
    run(command.env("LD_LIBRARY_PATH", &folder).env("DYLD_LIBRARY_PATH", &folder))
}

#[test]
fn the_contract_holds_from_c() {
    assert_eq!(compile_and_run("tests/contract.c", "contract-shared", &pkg_config(&["--libs"])), "");
    assert_eq!(compile_and_run("tests/contract.c", "contract-static", &pkg_config(&["--variable=archive"])), "");
}

#[test]
fn the_example_learns() {
    let shared = compile_and_run("examples/train.c", "train-shared", &pkg_config(&["--libs"]));
    assert!(shared.starts_with(concat!("batchnorm ", env!("CARGO_PKG_VERSION"), ": loss 0.693 to 0.")), "{shared}");
    assert_eq!(compile_and_run("examples/train.c", "train-static", &pkg_config(&["--variable=archive"])), shared);
}

#[test]
fn the_readme_runs() {
    let readme = std::fs::read_to_string(Path::new(HERE).join("README.md")).unwrap();
    let (_, from) = readme.split_once("```c\n").unwrap();
    let program = prefix().join("readme.c");
    std::fs::write(&program, from.split_once("```").unwrap().0).unwrap();
    assert_eq!(compile_and_run(program.to_str().unwrap(), "readme", &pkg_config(&["--libs"])), "");
}

#[test]
fn the_header_is_c_and_cpp() {
    for (compiler, standard, language) in [("cc", "-std=c11", "c"), ("c++", "-std=c++17", "c++")] {
        let header = prefix().join("include/batchnorm.h");
        // Used as well as read: the enumerations are what functions take and give.
        let user = prefix().join(format!("user.{language}"));
        let body =
            "bn_status status = bn_plan_set_tier(NULL, BN_TIER_BEST);\n    return status == BN_STATUS_NULL ? 0 : 1;";
        let text = format!("#include {header:?}\nint main(void) {{\n    {body}\n}}\n");
        std::fs::write(&user, text).unwrap();
        run(Command::new(compiler).args([standard, "-fsyntax-only", "-x", language]).args(STRICT).arg(&user));
    }
}

/// The shared library exports what the header declares, and nothing else; and it goes by the version of its ABI.
#[test]
#[cfg(target_os = "linux")]
fn the_library_exports_the_header() {
    let library: PathBuf = prefix().join(format!("lib/libbatchnorm_c.so.{}", batchnorm_c::BN_ABI_VERSION));
    let symbols = run(Command::new("nm").args(["-D", "--defined-only", "--format=posix"]).arg(&library));
    let exported: BTreeSet<_> = symbols.lines().filter_map(|line| line.split(' ').next()).collect();
    let header = std::fs::read_to_string(prefix().join("include/batchnorm.h")).unwrap();
    let declared: BTreeSet<_> = header
        .match_indices("bn_")
        .filter_map(|(at, _)| header[at..].split_once('(').map(|(name, _)| name))
        .filter(|name| name.chars().all(|c| c.is_ascii_lowercase() || c == '_'))
        .collect();
    assert_eq!(exported, declared);
    let dynamic = run(Command::new("readelf").arg("-d").arg(&library));
    assert!(dynamic.contains(&format!("[libbatchnorm_c.so.{}]", batchnorm_c::BN_ABI_VERSION)), "{dynamic}");
}
