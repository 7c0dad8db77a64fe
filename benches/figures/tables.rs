//! The tables of the documents. Each stands between `<!-- table NAME -->` and `<!-- end of table -->`, and is replaced as a whole.

use std::collections::BTreeMap;
use std::fmt;

use crate::{LAYOUTS, Peer, Result, Results, Roofline, Values, most, threads};

/// The goals of a pass over some layouts: the geometric mean, and the worst shape.
type Goal = (&'static str, &'static str, f64, f64);

const GOALS: [Goal; 6] = [
    ("forward", "NCHW", 1.12, 1.40),
    ("forward", "NHWC, NC", 1.12, 1.35),
    ("backward", "NCHW", 1.15, 1.60),
    ("backward", "NHWC, NC", 1.15, 1.40),
    ("inference", "NCHW", 1.05, 1.15),
    ("inference", "NHWC, NC", 1.05, 1.15),
];

/// The peer, the pass, the peer's layout, and how many times as fast ours is to be.
const PEER_GOALS: [(&str, &str, &str, &str); 12] = [
    ("PyTorch", "forward", "NCHW", "4"),
    ("PyTorch", "backward", "NCHW", "3"),
    ("PyTorch", "forward", "NHWC", "1.5"),
    ("PyTorch", "backward", "NHWC", "1.5"),
    ("oneDNN", "forward", "best", "1.6"),
    ("oneDNN", "forward", "NCHW", "4"),
    ("oneDNN", "forward", "NHWC", "1.15"),
    ("oneDNN", "backward", "best", "1.3"),
    ("oneDNN", "backward", "NCHW", "4"),
    ("candle", "step", "NCHW", "20"),
    ("burn", "step", "NCHW", "20"),
    ("burn", "step", "NHWC", "20"),
];

const FUSED: [(&str, &str); 5] = [
    ("forward act", "forward, ReLU"),
    ("forward res act", "forward, residual and ReLU"),
    ("forward act bits", "forward, ReLU, its bits recorded"),
    ("backward act", "backward of ReLU, its sign from x"),
    ("backward bits", "backward of ReLU, its sign from bits"),
];

const VALUES: [(&str, &str); 4] = [
    ("constant", "constant"),
    ("squares underflow", "1e-25, squares underflow"),
    ("subnormal", "1e-39, subnormal"),
    ("mean far away", "mean 1e4, deviation 0.6"),
];

const PASSES: [&str; 3] = ["forward", "backward", "inference"];

/// A table of Markdown.
pub struct Table {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    fn new(head: impl IntoIterator<Item = impl Into<String>>, rows: impl IntoIterator<Item = Vec<String>>) -> Self {
        Self { head: head.into_iter().map(Into::into).collect(), rows: rows.into_iter().collect() }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "| {} |", self.head.join(" | "))?;
        writeln!(f, "|{}", "---|".repeat(self.head.len()))?;
        self.rows.iter().try_for_each(|row| writeln!(f, "| {} |", row.join(" | ")))
    }
}

/// Every table of what was measured, by name.
pub fn all(results: &Results) -> BTreeMap<&'static str, Table> {
    let mut tables = BTreeMap::new();
    if !results.roofline.is_empty() {
        tables.extend([
            ("means", means(&results.roofline)),
            ("means in short", means_in_short(&results.roofline)),
            ("microseconds", microseconds(&results.roofline)),
            ("layouts", layouts(&results.roofline)),
            ("halves", halves(&results.roofline)),
            ("halves in short", halves_in_short(&results.roofline)),
        ]);
    }
    if !results.fused.is_empty() {
        tables.insert("fused", fused(&results.fused));
    }
    if !results.values.is_empty() {
        tables.insert("values", values(&results.values));
    }
    if !results.peers.is_empty() {
        tables.extend([("peers", peers(&results.peers)), ("peers in short", peers_in_short(&results.peers))]);
    }
    tables
}

/// The document with these tables in their places, and how many there were. Those of other names stay.
pub fn fill(document: &str, tables: &BTreeMap<&str, Table>) -> Result<(String, usize)> {
    let (mut text, mut filled) = (String::new(), 0);
    let mut lines = document.split_inclusive('\n');
    while let Some(line) = lines.next() {
        text += line;
        let indent = &line[..line.len() - line.trim_start().len()];
        let name = line.trim().strip_prefix("<!-- table ").and_then(|rest| rest.strip_suffix(" -->"));
        let Some(name) = name else { continue };
        let mut old = Vec::new();
        let end = loop {
            match lines.next() {
                Some(line) if line.trim() == "<!-- end of table -->" => break line,
                Some(line) => old.push(line),
                None => return Err(format!("the table {name} has no end").into()),
            }
        };
        match tables.get(name) {
            Some(table) => table.to_string().lines().for_each(|line| text += &format!("{indent}{line}\n")),
            None => old.iter().for_each(|line| text += line),
        }
        filled += usize::from(tables.contains_key(name));
        text += end;
    }
    Ok((text, filled))
}

/// The numbers of threads that were measured.
fn counts(of: impl Iterator<Item = usize>) -> Vec<usize> {
    let mut counts: Vec<usize> = of.collect();
    counts.sort();
    counts.dedup();
    counts
}

/// Columns: each of these with each number of threads.
fn with_threads<const N: usize>(
    each: [&'static str; N],
    of: impl Iterator<Item = usize>,
) -> Vec<(&'static str, usize)> {
    let counts = counts(of);
    each.into_iter().flat_map(|what| counts.iter().map(move |&n| (what, n))).collect()
}

fn title((what, n): (&str, usize)) -> String {
    format!("{what}, {}", threads(n))
}

/// The titles of columns, of which those after the first of each kind say the threads alone.
fn brief(columns: &[(&str, usize)]) -> Vec<String> {
    let is_first = |i: usize| i == 0 || columns[i - 1].0 != columns[i].0;
    let of = |(i, &column): (usize, &(&str, usize))| if is_first(i) { title(column) } else { threads(column.1) };
    columns.iter().enumerate().map(of).collect()
}

/// The geometric mean.
fn mean(ratios: &[f64]) -> f64 {
    (ratios.iter().map(|ratio| ratio.ln()).sum::<f64>() / ratios.len() as f64).exp()
}

/// Three digits, or so.
fn digits(value: f64) -> String {
    match value {
        v if v < 10.0 => format!("{v:.2}"),
        v if v < 100.0 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

/// Nothing where nothing was measured.
fn cell(ratios: &[f64], write: impl Fn(&[f64]) -> String) -> String {
    if ratios.is_empty() { String::new() } else { write(ratios) }
}

/// The lines of a pass over some layouts.
fn of<'a>(
    lines: &'a [Roofline],
    pass: &str,
    layouts: &str,
    dtype: &str,
    threads: usize,
) -> impl Iterator<Item = &'a Roofline> {
    lines.iter().filter(move |l| l.pass == pass && l.layouts() == layouts && l.dtype == dtype && l.threads == threads)
}

fn worst(ratios: impl Iterator<Item = f64>) -> f64 {
    ratios.fold(0.0, f64::max)
}

/// Geometric mean over all shapes / worst of at least 1 MB.
fn mean_and_worst<'a>(lines: impl Iterator<Item = &'a Roofline>) -> String {
    let lines: Vec<&Roofline> = lines.collect();
    let ratios: Vec<f64> = lines.iter().map(|l| l.ratio).collect();
    let size = |l: &Roofline| l.shape.bytes() * if l.dtype == "f64" { 2 } else { 1 };
    let worst = worst(lines.iter().filter(|l| size(l) >= 1_000_000).map(|l| l.ratio));
    cell(&ratios, |ratios| format!("{:.2} / {worst:.2}", mean(ratios)))
}

fn means(lines: &[Roofline]) -> Table {
    let columns = with_threads(["f32", "f64"], lines.iter().map(|l| l.threads));
    let head = ["pass", "layouts", "goal"].map(String::from).into_iter();
    Table::new(
        head.chain(columns.iter().copied().map(title)),
        GOALS.map(|(pass, layouts, goal, worst)| {
            let cells = columns.iter().map(|&(dtype, n)| mean_and_worst(of(lines, pass, layouts, dtype, n)));
            [pass.into(), layouts.into(), format!("{goal:.2} / {worst:.2}")].into_iter().chain(cells).collect()
        }),
    )
}

fn means_in_short(lines: &[Roofline]) -> Table {
    let counts = counts(lines.iter().map(|l| l.threads));
    let row = |title: &str, pass: &str| {
        let means = |n| {
            let mean = |layouts| {
                let ratios: Vec<f64> = of(lines, pass, layouts, "f32", n).map(|l| l.ratio).collect();
                cell(&ratios, |ratios| format!("{:.2}", mean(ratios)))
            };
            LAYOUTS.map(mean).join(" / ")
        };
        let title = format!("{title}: NCHW / NHWC and NC");
        std::iter::once(title).chain(counts.iter().map(|&n| means(n))).collect()
    };
    Table::new(
        std::iter::once(String::new()).chain(counts.iter().map(|&n| threads(n))),
        [("forward, training", "forward"), ("backward", "backward"), ("inference", "inference")]
            .map(|(title, pass)| row(title, pass)),
    )
}

/// Layouts and shapes in the order in which they were measured.
fn shapes(lines: &[Roofline]) -> Vec<(&str, String)> {
    let mut shapes = Vec::new();
    for line in lines {
        let shape = (line.layout.as_str(), line.shape.name());
        if !shapes.contains(&shape) {
            shapes.push(shape);
        }
    }
    shapes
}

fn find<'a>(
    lines: &'a [Roofline],
    (layout, shape): (&str, &str),
    pass: &str,
    dtype: &str,
    threads: usize,
) -> Option<&'a Roofline> {
    lines.iter().find(|l| {
        l.layout == layout && l.shape.name() == shape && l.pass == pass && l.dtype == dtype && l.threads == threads
    })
}

fn microseconds(lines: &[Roofline]) -> Table {
    let columns = with_threads(PASSES, lines.iter().map(|l| l.threads));
    let rows = shapes(lines).into_iter().map(|(layout, shape)| {
        let cells = columns.iter().map(|&(pass, n)| {
            let line = find(lines, (layout, &shape), pass, "f32", n);
            line.map_or(String::new(), |l| format!("{} ({:.2})", microsecond(l), l.ratio))
        });
        std::iter::once(format!("{layout} {shape}")).chain(cells).collect()
    });
    Table::new(std::iter::once("shape".into()).chain(brief(&columns)), rows)
}

fn microsecond(line: &Roofline) -> String {
    if line.kernel_us < 100.0 { format!("{:.1}", line.kernel_us) } else { format!("{:.0}", line.kernel_us) }
}

/// NHWC beside NCHW with the most threads, and the mean over the batches of 32.
fn layouts(lines: &[Roofline]) -> Table {
    let most = most(lines.iter().map(|l| l.threads));
    let both = |shape: &str, pass| {
        let find = |layout| find(lines, (layout, shape), pass, "f32", most);
        find("NHWC").zip(find("NCHW"))
    };
    let shapes: Vec<String> = shapes(lines).into_iter().filter(|s| s.0 == "NHWC").map(|s| s.1).collect();
    let rows = shapes.iter().map(|shape| {
        let cells = PASSES.map(|pass| {
            both(shape, pass).map_or(String::new(), |(a, b)| format!("{} / {}", microsecond(a), microsecond(b)))
        });
        std::iter::once(shape.clone()).chain(cells).collect()
    });
    let means = PASSES.map(|pass| {
        let of_batches = shapes.iter().filter(|shape| shape.starts_with("32x"));
        let ratios: Vec<f64> =
            of_batches.filter_map(|shape| both(shape, pass)).map(|(a, b)| a.kernel_us / b.kernel_us).collect();
        cell(&ratios, |ratios| format!("{:.2}", mean(ratios)))
    });
    let title = "geometric mean of batches of 32, NHWC over NCHW".to_string();
    Table::new(
        std::iter::once("shape").chain(PASSES),
        rows.chain([std::iter::once(title).chain(means).collect()]).collect::<Vec<_>>(),
    )
}

/// Elements per second over those of f32, geometric mean over shapes of more than 10 MB in f32.
fn throughput(lines: &[Roofline], pass: &str, layouts: &str, dtype: &str, threads: usize) -> String {
    let large = of(lines, pass, layouts, dtype, threads).filter(|l| l.shape.bytes() > 10_000_000);
    let ratio = |l: &Roofline| {
        let whole = find(lines, (&l.layout, &l.shape.name()), pass, "f32", threads)?;
        Some(whole.kernel_us / l.kernel_us)
    };
    cell(&large.filter_map(ratio).collect::<Vec<_>>(), |ratios| format!("{:.2}", mean(ratios)))
}

fn halves(lines: &[Roofline]) -> Table {
    let columns = with_threads(["bf16", "f16"], lines.iter().map(|l| l.threads));
    let rows = GOALS.map(|(pass, layouts, ..)| {
        let cells = columns.iter().map(|&(dtype, n)| throughput(lines, pass, layouts, dtype, n));
        [pass.into(), layouts.into()].into_iter().chain(cells).collect()
    });
    let head = ["pass", "layouts"].map(String::from).into_iter();
    Table::new(head.chain(columns.iter().copied().map(title)), rows)
}

fn halves_in_short(lines: &[Roofline]) -> Table {
    let most = most(lines.iter().map(|l| l.threads));
    let row = |pass: &str| {
        let cells = ["bf16", "f16"]
            .map(|dtype| LAYOUTS.map(|layouts| throughput(lines, pass, layouts, dtype, most)).join(" / "));
        std::iter::once(pass.into()).chain(cells).collect()
    };
    let title = format!("NCHW / NHWC and NC, {}", threads(most));
    Table::new([title.as_str(), "bf16", "f16"], PASSES.map(row))
}

fn fused(lines: &[Roofline]) -> Table {
    let columns = with_threads(LAYOUTS, lines.iter().map(|l| l.threads));
    let rows = FUSED.map(|(pass, what)| {
        let cells = columns.iter().map(|&(layouts, n)| mean_and_worst(of(lines, pass, layouts, "f32", n)));
        std::iter::once(what.into()).chain(cells).collect()
    });
    Table::new(std::iter::once("pass".into()).chain(columns.iter().copied().map(title)), rows)
}

/// Geometric mean / worst over the shapes.
fn values(lines: &[Values]) -> Table {
    let columns = with_threads(["forward", "inference", "backward"], lines.iter().map(|l| l.threads));
    let rows = VALUES.map(|(values, what)| {
        let cells = columns.iter().map(|&(pass, n)| {
            let of = lines.iter().filter(|l| l.pass == pass && l.values == values && l.threads == n);
            let ratios: Vec<f64> = of.map(|l| l.ratio).collect();
            cell(&ratios, |ratios| format!("{:.2} / {:.2}", mean(ratios), worst(ratios.iter().copied())))
        });
        std::iter::once(what.into()).chain(cells).collect()
    });
    Table::new(std::iter::once("values".into()).chain(brief(&columns)), rows)
}

/// Peers with the most threads on f32: what tells them apart, and the ratios over the shapes.
fn contests(lines: &[Peer]) -> BTreeMap<[&str; 4], (&str, Vec<f64>)> {
    let most = most(lines.iter().map(|l| l.threads));
    let mut contests = BTreeMap::new();
    for l in lines.iter().filter(|l| l.dtype == "f32" && l.threads == most) {
        let key = [&l.peer, &l.pass, &l.layout, &l.our_layout].map(String::as_str);
        // Without what follows a plus, which says how it was built.
        let version = l.version.split('+').next().unwrap_or_default();
        contests.entry(key).or_insert((version, Vec::new())).1.push(l.ratio);
    }
    contests
}

fn peers(lines: &[Peer]) -> Table {
    let rows = contests(lines).into_iter().map(|([peer, pass, layout, ours], (version, ratios))| {
        let goal = PEER_GOALS.iter().find(|goal| (goal.0, goal.1, goal.2) == (peer, pass, layout));
        let least = ratios.iter().copied().fold(f64::MAX, f64::min);
        let goal = goal.filter(|_| layout == ours || layout == "best").map_or("", |goal| goal.3);
        let name = format!("{peer} {version}");
        [&name, pass, layout, ours, &digits(mean(&ratios)), &digits(least), goal].map(String::from).to_vec()
    });
    Table::new(["peer", "pass", "its layout", "ours", "times as fast", "the least", "goal"], rows)
}

fn peers_in_short(lines: &[Peer]) -> Table {
    let contests = contests(lines);
    let row = |peer: &str, how: &str, [layout, ours]: [&str; 2], passes: &[&str]| {
        let found: Vec<_> = passes.iter().filter_map(|pass| contests.get(&[peer, pass, layout, ours])).collect();
        let version = found.first()?.0;
        let means: Vec<String> = found.iter().map(|(_, ratios)| digits(mean(ratios))).collect();
        Some(vec![format!("{peer} {version}, {how}"), means.join(" / ")])
    };
    let most = most(lines.iter().map(|l| l.threads));
    let title = format!("f32, {}, geometric mean over the convolution outputs of ResNet-50 at batch 32", threads(most));
    let (same, last, all) = (["NCHW"; 2], ["NHWC"; 2], "forward / backward / inference");
    let rows = [
        row("candle", "forward and backward, through its graph", same, &["step"]),
        row("burn", "forward and backward, through its graph", same, &["step"]),
        row("PyTorch", &format!("{all}, NCHW"), same, &PASSES),
        row("PyTorch", &format!("{all}, NHWC"), last, &PASSES),
        row("oneDNN", &format!("{all}, NHWC"), last, &PASSES),
        row("oneDNN", &format!("{all}, the best of its layouts against our NCHW"), ["best", "NCHW"], &PASSES),
    ];
    Table::new([title.as_str(), "times as fast"], rows.into_iter().flatten())
}
