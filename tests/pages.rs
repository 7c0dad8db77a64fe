//! The pages: links lead to files and headings that are there, and each row of a migration page names tests that are there.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Pages, and the folder with the tests of each migration page.
const MIGRATIONS: [(&str, &str); 5] = [
    ("pytorch", "integrations/python/tests/test_migration_pytorch.py"),
    ("keras", "integrations/python/tests/test_migration_keras.py"),
    ("onnx", "integrations/python/tests/test_migration_onnx.py"),
    ("candle", "integrations/candle/tests"),
    ("burn", "integrations/burn/tests"),
];

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The files in a folder, or the file itself, whose names end in one of these.
fn files(path: PathBuf, endings: &[&str]) -> Vec<PathBuf> {
    if !path.is_dir() {
        return vec![path];
    }
    let all = fs::read_dir(path).unwrap().flat_map(|entry| files(entry.unwrap().path(), endings));
    all.filter(|path| path.extension().is_some_and(|is| endings.contains(&is.to_str().unwrap()))).collect()
}

/// Lines outside of blocks of code.
fn prose(page: &str) -> impl Iterator<Item = &str> {
    let mut is_code = false;
    page.lines().filter(move |line| {
        let fence = line.starts_with("```");
        is_code ^= fence;
        !is_code && !fence
    })
}

/// What stands between `open` and `close`.
fn between<'a>(text: &'a str, open: &'a str, close: char) -> impl Iterator<Item = &'a str> {
    text.split(open).skip(1).filter_map(move |rest| rest.split_once(close)).map(|(inside, _)| inside)
}

/// The names by which headings are linked to.
fn anchors(page: &str) -> HashSet<String> {
    let headings =
        prose(page).filter_map(|line| line.strip_prefix('#')).map(|line| line.trim_start_matches('#').trim());
    let anchor = |heading: &str| {
        let kept = heading.to_lowercase().replace(' ', "-");
        kept.chars().filter(|c| c.is_alphanumeric() || "-_".contains(*c)).collect()
    };
    headings.map(anchor).collect()
}

#[test]
fn links_lead_somewhere() {
    let root = Path::new(ROOT);
    let mut pages = files(root.join("docs"), &["md"]);
    pages.push(root.join("README.md"));
    for path in pages {
        let page = read(&path);
        for link in prose(&page).flat_map(|line| between(line, "](", ')')).filter(|link| !link.contains("://")) {
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let to = if file.is_empty() { path.clone() } else { path.parent().unwrap().join(file) };
            assert!(to.exists(), "{} links to {link}, which is not there", path.display());
            assert!(
                anchor.is_empty() || anchors(&read(&to)).contains(anchor),
                "{} links to {link}, a heading that is not there",
                path.display()
            );
        }
    }
}

#[test]
fn rows_of_migration_pages_name_tests() {
    for (name, tests) in MIGRATIONS {
        let code: String = files(Path::new(ROOT).join(tests), &["rs", "py"]).iter().map(|path| read(path)).collect();
        let page = read(&Path::new(ROOT).join(format!("docs/migrate/{name}.md")));
        let mut rows = 0;
        for row in prose(&page).filter(|line| line.starts_with("| ")).skip(1) {
            let named = row.trim_end_matches([' ', '|']).rsplit('|').next().unwrap();
            let names: Vec<_> = named.split('`').skip(1).step_by(2).collect();
            assert!(!names.is_empty(), "{name}: no test in the row {row}");
            for test in names {
                let is_there = ["fn ", "def "].iter().any(|keyword| code.contains(&format!("{keyword}{test}(")));
                assert!(is_there, "{name}: {tests} has no test {test}");
            }
            rows += 1;
        }
        assert!(rows >= 10, "{name}: a table of {rows} rows");
    }
}
