//! The table, its summary, and the file.

use serde::Serialize;

use crate::contestant::About;
use crate::problem::Problem;

/// One line of the table. A ratio is how many times as fast as the peer this crate is.
#[derive(Debug, Serialize)]
pub struct Row {
    pub peer: &'static str,
    pub version: String,
    pub implementation: String,
    pub pass: &'static str,
    pub layout: &'static str,
    pub our_layout: &'static str,
    pub dtype: &'static str,
    pub shape: Shape,
    pub threads: usize,
    pub peer_us: f64,
    pub ours_us: f64,
    pub ratio: f64,
}

#[derive(Debug, Serialize)]
pub struct Shape {
    pub n: usize,
    pub c: usize,
    pub spatial: [usize; 2],
}

impl Row {
    pub fn new(
        problem: &Problem,
        about: &About,
        implementation: &str,
        peer_us: f64,
        our_layout: &'static str,
        ours_us: f64,
    ) -> Self {
        let size = problem.size;
        Self {
            peer: about.peer,
            version: about.version.clone(),
            implementation: implementation.into(),
            pass: problem.pass.name(),
            layout: about.layout,
            our_layout,
            dtype: problem.dtype.name(),
            shape: Shape { n: size.n, c: size.c, spatial: [size.h, size.w] },
            threads: problem.threads,
            peer_us,
            ours_us,
            ratio: peer_us / ours_us,
        }
    }

    pub fn print(&self) {
        let Shape { n, c, spatial: [h, w] } = self.shape;
        println!(
            "{:<8} {:<13} {:<34} {:<9} {:<7} {:<5} {:<5} {:<14} {:>7} {:>10.1} {:>10.1} {:>7.2}",
            self.peer,
            self.version,
            self.implementation,
            self.pass,
            self.layout,
            self.our_layout,
            self.dtype,
            format!("{n}x{c}x{h}x{w}"),
            self.threads,
            self.peer_us,
            self.ours_us,
            self.ratio
        );
    }
}

pub fn print_header() {
    println!(
        "{:<8} {:<13} {:<34} {:<9} {:<7} {:<5} {:<5} {:<14} {:>7} {:>10} {:>10} {:>7}",
        "peer",
        "version",
        "implementation",
        "pass",
        "layout",
        "ours",
        "dtype",
        "shape",
        "threads",
        "peer us",
        "ours us",
        "ratio"
    );
}

/// The geometric mean and the smallest of the ratios over the shapes.
pub fn print_summary(rows: &[Row]) {
    println!(
        "\n{:<8} {:<9} {:<8} {:<5} {:<5} {:>7} {:>6} {:>9} {:>8}",
        "peer", "pass", "layout", "ours", "dtype", "threads", "shapes", "geo mean", "smallest"
    );
    let group = |r: &Row| (r.peer, r.pass, r.layout, r.our_layout, r.dtype, r.threads);
    let mut groups: Vec<_> = rows.iter().map(group).collect();
    groups.sort();
    groups.dedup();
    for g in groups {
        let ratios: Vec<f64> = rows.iter().filter(|r| group(r) == g).map(|r| r.ratio).collect();
        let mean = (ratios.iter().map(|r| r.ln()).sum::<f64>() / ratios.len() as f64).exp();
        let smallest = ratios.iter().copied().fold(f64::INFINITY, f64::min);
        let (peer, pass, layout, our_layout, dtype, threads) = g;
        println!(
            "{peer:<8} {pass:<9} {layout:<8} {our_layout:<5} {dtype:<5} {threads:>7} {:>6} {mean:>9.2} {smallest:>8.2}",
            ratios.len()
        );
    }
}
