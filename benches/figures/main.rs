//! Draws what the other benches wrote into the target directory, and fills the tables of the documents with it.
//!
//! `cargo bench --bench figures` takes what there is of roofline.json, fused.json, sweep.json, values.json, whitening.json and
//! peers.json; a picture or table of a file that is not there stays as it is.

use std::path::{Path, PathBuf};

use clap::Parser;
use serde::Deserialize;
use serde::de::DeserializeOwned;

mod pictures;
#[path = "../../examples/plot/mod.rs"]
mod plot;
mod tables;

/// Draws the results of the other benches, and fills the tables of the documents with them.
#[derive(Parser)]
struct Args {
    /// Where README.md and docs/ are written to
    #[arg(long, default_value = env!("CARGO_MANIFEST_DIR"))]
    out: PathBuf,
    /// Passed by cargo bench
    #[arg(long, hide = true)]
    bench: bool,
}

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The documents with tables.
const DOCUMENTS: [&str; 3] = ["README.md", "docs/performance.md", "docs/choosing.md"];

/// Groups of layouts: planes, and rows.
const LAYOUTS: [&str; 2] = ["NCHW", "NHWC, NC"];

/// A shape in the files of results.
#[derive(Deserialize)]
struct Shape {
    n: usize,
    c: usize,
    spatial: Vec<usize>,
}

impl Shape {
    fn name(&self) -> String {
        [&[self.n, self.c], &self.spatial[..]].concat().iter().map(usize::to_string).collect::<Vec<_>>().join("x")
    }

    /// Bytes of the tensor in f32.
    fn bytes(&self) -> usize {
        self.n * self.c * self.spatial.iter().product::<usize>() * 4
    }
}

#[derive(Deserialize)]
struct Roofline {
    pass: String,
    layout: String,
    dtype: String,
    shape: Shape,
    threads: usize,
    kernel_us: f64,
    ratio: f64,
}

impl Roofline {
    /// Those that its layout is grouped with.
    fn layouts(&self) -> &'static str {
        LAYOUTS[usize::from(self.layout.ends_with('C'))]
    }
}

#[derive(Deserialize)]
struct Sweep {
    pass: String,
    layout: String,
    bytes: usize,
    threads: usize,
    ns_per_element: f64,
}

#[derive(Deserialize)]
struct Values {
    pass: String,
    values: String,
    threads: usize,
    ratio: f64,
}

#[derive(Deserialize)]
struct Whitening {
    pass: String,
    norm: String,
    channels: usize,
    ns_per_element: f64,
}

#[derive(Deserialize)]
struct Peer {
    peer: String,
    version: String,
    pass: String,
    layout: String,
    our_layout: String,
    dtype: String,
    shape: Shape,
    threads: usize,
    ratio: f64,
}

/// What was measured; nothing where there is no file.
struct Results {
    roofline: Vec<Roofline>,
    fused: Vec<Roofline>,
    sweep: Vec<Sweep>,
    values: Vec<Values>,
    whitening: Vec<Whitening>,
    peers: Vec<Peer>,
}

impl Results {
    fn read(target: &Path) -> Result<Self> {
        fn lines<T: DeserializeOwned>(target: &Path, name: &str) -> Result<Vec<T>> {
            let from = target.join(name).with_extension("json");
            if !from.exists() {
                println!("{name}: not measured, there is no {}", from.display());
                return Ok(Vec::new());
            }
            Ok(serde_json::from_str(&std::fs::read_to_string(from)?)?)
        }
        Ok(Self {
            roofline: lines(target, "roofline")?,
            fused: lines(target, "fused")?,
            sweep: lines(target, "sweep")?,
            values: lines(target, "values")?,
            whitening: lines(target, "whitening")?,
            peers: lines(target, "peers")?,
        })
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let results = Results::read(&std::env::var("CARGO_TARGET_DIR").map_or(root.join("target"), PathBuf::from))?;
    std::fs::create_dir_all(args.out.join("docs"))?;
    for (name, picture) in [
        ("roofline", drawn(pictures::roofline, &results.roofline)?),
        ("sweep", drawn(pictures::sweep, &results.sweep)?),
        ("whitening", drawn(pictures::whitening, &results.whitening)?),
        ("peers", drawn(pictures::peers, &results.peers)?),
    ] {
        if let Some(picture) = picture {
            let to = args.out.join("docs").join(name).with_extension("svg");
            std::fs::write(&to, picture)?;
            println!("{name}: drawn to {}", to.display());
        }
    }
    let tables = tables::all(&results);
    for name in DOCUMENTS {
        let (text, filled) = tables::fill(&std::fs::read_to_string(root.join(name))?, &tables)?;
        std::fs::write(args.out.join(name), text)?;
        println!("{name}: {filled} tables filled");
    }
    Ok(())
}

/// The picture of these lines, if there are any.
fn drawn<T>(draw: impl Fn(&[T]) -> Result<String>, lines: &[T]) -> Result<Option<String>> {
    (!lines.is_empty()).then(|| draw(lines)).transpose()
}

fn threads(n: usize) -> String {
    if n == 1 { "1 thread".into() } else { format!("{n} threads") }
}

/// The most threads that were measured.
fn most(threads: impl Iterator<Item = usize>) -> usize {
    threads.max().unwrap_or(1)
}
