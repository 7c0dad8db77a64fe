//! Prints the worst errors of this crate, and of PyTorch beside it, as tables in Markdown: those of docs/numerics.md.
//!
//! `examples/numerics/run` installs PyTorch; `cargo run --release --all-features --example numerics` does without.

#[path = "../../tests/exact/mod.rs"]
mod exact;

use std::error::Error;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use batchnorm::{Element, Shape};
use clap::Parser;
use exact::{Errors, ONES, Problem, Quantity, Results, Set, Statistics, USUAL, sets, shapes};

#[derive(Parser)]
struct Arguments {
    /// A Python that has torch and numpy.
    #[arg(long)]
    python: Option<PathBuf>,
}

/// The process of pytorch.py.
struct PyTorch {
    version: String,
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl PyTorch {
    fn start(python: &PathBuf) -> Result<Self, Box<dyn Error>> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/numerics/pytorch.py");
        let mut child = Command::new(python).arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (to, from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut peer = Self { version: String::new(), child, to, from: BufReader::new(from) };
        peer.from.read_line(&mut peer.version)?;
        Ok(peer)
    }

    fn results<E: Bytes>(&mut self, layout: &str, problem: &Problem<E>) -> Result<Results, Box<dyn Error>> {
        let (shape, channels) = (problem.shape, problem.shape.channels());
        let (n, s) = (shape.batch(), shape.spatial());
        writeln!(self.to, "{} {layout} {n} {channels} 1 {s} {}", E::NAME, problem.eps)?;
        for tensor in [&problem.x, &problem.dy[0], &problem.dy[1]] {
            let bytes: Vec<u8> = tensor.iter().flat_map(|v| v.bytes()).collect();
            self.to.write_all(&bytes)?;
        }
        self.to.flush()?;
        let mut read = |len: usize| {
            let mut bytes = vec![0; 8 * len];
            self.from.read_exact(&mut bytes)?;
            let (values, _) = bytes.as_chunks();
            Ok::<_, std::io::Error>(values.iter().map(|&v| f64::from_le_bytes(v)).collect::<Vec<_>>())
        };
        let (mean, var) = (read(channels)?, read(channels)?);
        Ok(Results {
            statistics: vec![Statistics::of::<E::Param>(mean, vec![0.0; channels], var)],
            y: read(shape.len())?,
            dx: [read(shape.len())?, read(shape.len())?],
            dgamma: read(channels)?,
            dbeta: read(channels)?,
        })
    }
}

impl Drop for PyTorch {
    fn drop(&mut self) {
        // It may be waiting for a request; its exit status means nothing.
        let _ = self.child.kill().and_then(|()| self.child.wait());
    }
}

/// An element type as it is sent.
trait Bytes: Element {
    const NAME: &str;
    fn bytes(self) -> impl Iterator<Item = u8>;
}

macro_rules! bytes {
    ($($t:ty, $name:literal;)*) => {$(
        impl Bytes for $t {
            const NAME: &str = $name;
            fn bytes(self) -> impl Iterator<Item = u8> {
                self.to_le_bytes().into_iter()
            }
        }
    )*};
}

bytes!(f32, "f32"; f64, "f64";);
#[cfg(feature = "half")]
bytes!(half::bf16, "bf16"; half::f16, "f16";);

/// The worst errors of the data sets that share a row, ours and PyTorch's.
struct Row {
    element: &'static str,
    layout: &'static str,
    family: &'static str,
    errors: [Errors; 2],
}

fn measure<E: Bytes>(peer: &mut Option<PyTorch>, rows: &mut Vec<Row>) -> Result<(), Box<dyn Error>> {
    let mut problem = |layout, shape: Shape, set: &Set| {
        let problem = Problem::<E>::new(shape, set);
        let theirs = match peer {
            Some(peer) => problem.errors(&peer.results(layout, &problem)?),
            None => Errors::NONE,
        };
        let errors = [problem.errors(&problem.ours()), theirs];
        let is_of = |row: &&mut Row| (row.element, row.layout, row.family) == (E::NAME, layout, set.family);
        match rows.iter_mut().find(is_of) {
            Some(row) => row.errors = [0, 1].map(|i| row.errors[i].max(errors[i])),
            None => rows.push(Row { element: E::NAME, layout, family: set.family, errors }),
        }
        Ok::<_, Box<dyn Error>>(())
    };
    for set in sets::<E>() {
        for (layout, shape) in shapes() {
            problem(layout, shape, &set)?;
        }
    }
    problem("NCHW", Shape::nchw(1, 1, 1, (1 << 24) + 1)?, &ONES)
}

/// Prints a table of rows with a title in front of the figures, ours / PyTorch's.
fn print(titles: &str, rows: impl IntoIterator<Item = (String, [Errors; 2])>) {
    println!("\n| {titles} | {} |", Quantity::ALL.map(Quantity::name).join(" | "));
    println!("|{}", "---|".repeat(titles.split('|').count() + Quantity::ALL.len()));
    for (title, errors) in rows {
        let figure = |error: f64| match error {
            error if error.is_nan() => "–".to_string(),
            0.0 => "0".to_string(),
            f64::INFINITY => "inf".to_string(),
            error => format!("{error:.1e}"),
        };
        let cells = Quantity::ALL.map(|quantity| errors.map(|errors| figure(errors.get(quantity))).join(" / "));
        println!("| {title} | {} |", cells.join(" | "));
    }
}

/// The worst of rows.
fn worst<'a>(rows: impl Iterator<Item = &'a Row>) -> [Errors; 2] {
    rows.fold([Errors::NONE; 2], |worst, row| [0, 1].map(|i| worst[i].max(row.errors[i])))
}

fn unique<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    names.fold(Vec::new(), |mut names, name| {
        if !names.contains(&name) {
            names.push(name);
        }
        names
    })
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut peer = Arguments::parse().python.as_ref().map(PyTorch::start).transpose()?;
    let mut rows = Vec::new();
    measure::<f32>(&mut peer, &mut rows)?;
    measure::<f64>(&mut peer, &mut rows)?;
    #[cfg(feature = "half")]
    {
        measure::<half::bf16>(&mut peer, &mut rows)?;
        measure::<half::f16>(&mut peer, &mut rows)?;
    }
    println!("This crate / PyTorch {}", peer.as_ref().map_or("(none)", |peer| peer.version.trim()));

    let elements = unique(rows.iter().map(|row| row.element));
    let by_layout = || elements.iter().flat_map(|&element| ["NCHW", "NHWC", "NC"].map(|layout| (element, layout)));
    let of = |(element, layout)| rows.iter().filter(move |row| (row.element, row.layout) == (element, layout));
    println!("\n## {}", USUAL.join(", "));
    let usual = |(element, layout)| {
        let usual = of((element, layout)).filter(|row| USUAL.contains(&row.family));
        (format!("{element} | {layout}"), worst(usual))
    };
    print("type | layout", by_layout().map(usual));
    for (element, layout) in by_layout() {
        println!("\n## {element}, {layout}");
        print("data", of((element, layout)).map(|row| (row.family.to_string(), row.errors)));
    }
    Ok(())
}
