//! Looks into a dump of activations: `cargo run --release --example inspect -- FILE.npy` (or FILE.safetensors) prints the
//! statistics of each channel, the worst channels first, says which are dead, exploding or not numbers, and draws them.

mod demo;
mod dump;
mod figure;
#[path = "../plot/mod.rs"]
mod plot;
mod report;
mod statistics;

use clap::Parser;
use dump::{Dump, Extent, Tensor};
use indicatif::{ProgressBar, ProgressStyle};
use statistics::{Channels, Found};
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::{error, fs};

/// Statistics of each channel of a dump of activations, and a picture of them.
#[derive(Parser)]
struct Args {
    /// A tensor from numpy.save, or tensors in the safetensors format: f16, bf16, f32 or f64
    #[arg(required_unless_present = "demo")]
    file: Option<PathBuf>,
    /// The tensor to look into, where the file has several
    #[arg(long, value_name = "NAME")]
    tensor: Option<String>,
    /// What the dimensions are, a letter for each: nchw, nhwc, nc, ncl, nlc, chw, ... The second are the channels if not given
    #[arg(long, value_name = "LETTERS")]
    layout: Option<String>,
    /// Where the picture goes
    #[arg(long, value_name = "FILE", default_value = "inspect.svg")]
    out: PathBuf,
    /// Channels that the table shows
    #[arg(long, value_name = "NUMBER", default_value = "20")]
    rows: usize,
    /// Makes up a dump with some bad channels, writes it to FILE (demo.npy if not given), and looks into that
    #[arg(long, conflicts_with_all = ["tensor", "layout"])]
    demo: bool,
}

type Result<T> = std::result::Result<T, Box<dyn error::Error + Send + Sync>>;

fn main() -> ExitCode {
    match run(&Args::parse(), &mut io::stdout().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads has seen enough.
        Err(e) if e.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) => {
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args, out: &mut impl Write) -> Result<()> {
    let file = args.file.clone().unwrap_or_else(|| "demo.npy".into());
    if args.demo {
        demo::write(&file)?;
    }
    let name = file.display();
    let dump = Dump::open(&file).map_err(|e| format!("{name}: {e}"))?;
    let layout = args.layout.as_deref();
    match (&args.tensor, &dump.tensors[..]) {
        (None, [tensor]) => one(args, &dump, tensor, &name.to_string(), out),
        (Some(wanted), tensors) => match tensors.iter().find(|tensor| tensor.name == *wanted) {
            Some(tensor) => one(args, &dump, tensor, &format!("{name}, {wanted}"), out),
            None => {
                let names: Vec<_> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
                Err(format!("{name} has no tensor {wanted:?}; it has: {}", names.join(", ")).into())
            }
        },
        (None, tensors) => {
            // A tensor without channels is no reason to keep the others back.
            let lines = tensors.iter().map(|tensor| (tensor, found(&dump, tensor, layout)));
            report::tensors(out, &name.to_string(), lines)
        }
    }
}

/// A tensor with its picture; what is wrong with it is told with its `name`.
fn one(args: &Args, dump: &Dump, tensor: &Tensor, name: &str, out: &mut impl Write) -> Result<()> {
    let found = found(dump, tensor, args.layout.as_deref());
    let (extent, found) = found.map_err(|e| format!("{name}: {e}"))?;
    // First, since whoever reads the table may stop.
    fs::write(&args.out, figure::draw(&tensor.title(), &found)?).map_err(|e| format!("{}: {e}", args.out.display()))?;
    report::channels(out, tensor, extent, &found, args.rows)?;
    writeln!(out, "Picture: {}", args.out.display())?;
    Ok(())
}

/// Where the channels of a tensor are, and what is wrong with them.
fn found(dump: &Dump, tensor: &Tensor, layout: Option<&str>) -> Result<(Extent, Found)> {
    let extent = tensor.extent(layout)?;
    Ok((extent, measure(dump, tensor, extent)?.judge()))
}

/// Reads a tensor in stretches, under a bar that shows on a terminal alone.
fn measure(dump: &Dump, tensor: &Tensor, extent: Extent) -> Result<Channels> {
    let style = ProgressStyle::with_template("{msg} {bar:40} {bytes} of {total_bytes}, {eta} left")?;
    let bar = ProgressBar::new(tensor.bytes()).with_style(style).with_message(tensor.name.clone());
    let channels = statistics::measure(dump, tensor, extent, statistics::STRETCH, |bytes| bar.inc(bytes));
    bar.finish_and_clear();
    channels
}

#[cfg(test)]
mod tests;
