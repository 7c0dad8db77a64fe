//! The pictures, as SVG.

use std::collections::BTreeMap;

use plotters::coord::combinators::LogCoord;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::plot::{COLORS, Panel, look, svg};
use crate::{LAYOUTS, Peer, Result, Roofline, Sweep, Whitening, most, threads};

/// Sizes of text: of labels and of titles, and those of a grid.
const SMALL: (&str, i32) = ("sans-serif", 13);
const LARGE: (&str, i32) = ("sans-serif", 20);
const GRID: [i32; 2] = [13, 15];

/// A panel for each pass and group of layouts, a row for each shape, a dot for each number of threads.
pub fn roofline(lines: &[Roofline]) -> Result<String> {
    svg((1500, 900), |sheet| {
        for (i, panel) in sheet.split_evenly((2, 3)).iter().enumerate() {
            let pass = ["forward", "backward", "inference"][i % 3];
            let layouts = LAYOUTS[i / 3];
            let inside = |l: &&Roofline| l.pass == pass && l.layouts() == layouts && l.dtype == "f32";
            let mut dots = Dots::default();
            for line in lines.iter().filter(inside) {
                dots.add(format!("{} {}", line.layout, line.shape.name()), &threads(line.threads), line.ratio);
            }
            dots.draw(panel, &format!("{pass}, {}", ["NCHW, NCDHW", "NHWC, NC"][i / 3]), "time / yardstick, f32")?;
        }
        Ok(())
    })
}

/// Values by row and series.
#[derive(Default)]
struct Dots {
    rows: Vec<String>,
    series: BTreeMap<String, Vec<(usize, f64)>>,
}

impl Dots {
    fn add(&mut self, row: String, series: &str, value: f64) {
        let at = self.rows.iter().position(|r| *r == row).unwrap_or_else(|| {
            self.rows.push(row);
            self.rows.len() - 1
        });
        self.series.entry(series.into()).or_default().push((at, value));
    }

    /// Rows from the top, with a line at 1; values on an axis that is logarithmic where they differ much.
    fn draw(&self, panel: &Panel, title: &str, description: &str) -> Result<()> {
        let values = || self.series.values().flatten().map(|dot| dot.1);
        let (low, high) = (values().fold(0.8, f64::min) * 0.95, values().fold(2.0, f64::max) * 1.1);
        if high / low > 10.0 {
            self.draw_on(panel, [title, description], low, (low..high).log_scale())
        } else {
            self.draw_on(panel, [title, description], 0.0, 0.0..high)
        }
    }

    fn draw_on<X>(&self, panel: &Panel, [title, description]: [&str; 2], low: f64, axis: X) -> Result<()>
    where
        X: AsRangedCoord<Value = f64>,
        X::CoordDescType: ValueFormatter<f64>,
    {
        let rows = self.rows.len() as f64;
        let mut chart = ChartBuilder::on(panel)
            .margin(10)
            .caption(title, LARGE)
            .x_label_area_size(40)
            .y_label_area_size(150)
            .build_cartesian_2d(axis, -0.5..rows - 0.5)?;
        look(&mut chart.configure_mesh(), GRID)
            .disable_y_mesh()
            .disable_y_axis()
            .x_desc(description)
            .x_labels(8)
            .x_label_formatter(&|x| format!("{x:.1}"))
            .draw()?;
        chart.draw_series(LineSeries::new([(1.0, -0.5), (1.0, rows - 0.5)], BLACK.mix(0.6)))?;
        let text = SMALL.into_text_style(panel).pos(Pos::new(HPos::Right, VPos::Center));
        for (i, row) in self.rows.iter().enumerate() {
            let label = EmptyElement::at((low, rows - 1.0 - i as f64)) + Text::new(row.clone(), (-6, 0), text.clone());
            chart.draw_series([label])?;
        }
        for ((name, dots), color) in self.series.iter().zip(COLORS) {
            let dot = move |at| Circle::new(at, 4, color.filled());
            chart
                .draw_series(dots.iter().map(|&(row, value)| dot((value, rows - 1.0 - row as f64))))?
                .label(name)
                .legend(move |(x, y)| Circle::new((x + 8, y), 4, color.filled()));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.8))
            .label_font(SMALL)
            .draw()?;
        Ok(())
    }
}

/// A panel for each number of threads, a line for each pass.
pub fn sweep(lines: &[Sweep]) -> Result<String> {
    let most = most(lines.iter().map(|line| line.threads));
    let (low, high) = lines
        .iter()
        .fold((f64::MAX, 0.0f64), |(low, high), line| (low.min(line.ns_per_element), high.max(line.ns_per_element)));
    svg((1300, 900), |sheet| {
        for (i, panel) in sheet.split_evenly((2, 2)).iter().enumerate() {
            let (n, layout) = ([1, most][i % 2], ["NCHW", "NHWC"][i / 2]);
            let mut chart = ChartBuilder::on(panel)
                .margin(14)
                .caption(format!("{layout}, {}", threads(n)), LARGE)
                .x_label_area_size(40)
                .y_label_area_size(60)
                .build_cartesian_2d((1e3..1.2e9).log_scale(), (low * 0.9..high * 3.0).log_scale())?;
            look(&mut chart.configure_mesh(), GRID)
                .x_desc("bytes of the tensor, f32")
                .y_desc("ns per element")
                .x_label_formatter(&|x| size(*x))
                .draw()?;
            for (pass, color) in ["forward", "backward", "inference", "copy", "stream"].iter().zip(COLORS) {
                let of_pass = lines
                    .iter()
                    .filter(|line| line.pass == *pass && line.threads == n)
                    .filter(|line| line.layout == layout || line.layout == "-");
                let points = of_pass.map(|line| (line.bytes as f64, line.ns_per_element));
                let label = match *pass {
                    "copy" => "copy, cached stores",
                    "stream" => "copy, streaming stores",
                    pass => pass,
                };
                series(&mut chart, label, color.stroke_width(if *pass == "copy" { 1 } else { 2 }), points)?;
            }
            legend(&mut chart)?;
        }
        Ok(())
    })
}

type Chart<'a, 'svg> = ChartContext<'a, SVGBackend<'svg>, Cartesian2d<LogCoord<f64>, LogCoord<f64>>>;

/// A line with its name.
fn series(chart: &mut Chart, name: &str, style: ShapeStyle, points: impl Iterator<Item = (f64, f64)>) -> Result<()> {
    chart
        .draw_series(LineSeries::new(points, style))?
        .label(name)
        .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
    Ok(())
}

fn legend<'a, 'svg: 'a>(chart: &mut Chart<'a, 'svg>) -> Result<()> {
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperMiddle)
        .background_style(WHITE.mix(0.8))
        .label_font(SMALL)
        .draw()?;
    Ok(())
}

/// A panel for each pass, a line for each way to normalize.
pub fn whitening(lines: &[Whitening]) -> Result<String> {
    let (low, high) = lines
        .iter()
        .fold((f64::MAX, 0.0f64), |(low, high), line| (low.min(line.ns_per_element), high.max(line.ns_per_element)));
    let most = lines.iter().map(|line| line.channels).max().unwrap_or(1) as f64;
    let mut norms: Vec<&str> = Vec::new();
    for line in lines {
        if !norms.contains(&line.norm.as_str()) {
            norms.push(&line.norm);
        }
    }
    svg((1300, 450), |sheet| {
        for (panel, pass) in sheet.split_evenly((1, 2)).iter().zip(["forward", "backward"]) {
            let mut chart = ChartBuilder::on(panel)
                .margin(14)
                .caption(pass, LARGE)
                .x_label_area_size(40)
                .y_label_area_size(60)
                .build_cartesian_2d((8.0..most).log_scale().base(2.0), (low * 0.9..high * 3.0).log_scale())?;
            look(&mut chart.configure_mesh(), GRID)
                .x_desc("channels")
                .y_desc("ns per element")
                .x_label_formatter(&|x| format!("{x:.0}"))
                .draw()?;
            for (norm, color) in norms.iter().zip(COLORS) {
                let of = lines.iter().filter(|line| line.pass == pass && line.norm == *norm);
                let points = of.map(|line| (line.channels as f64, line.ns_per_element));
                series(&mut chart, norm, color.stroke_width(2), points)?;
            }
            legend(&mut chart)?;
        }
        Ok(())
    })
}

fn size(bytes: f64) -> String {
    match bytes {
        b if b < 1e6 => format!("{:.0} KB", b / 1e3),
        b if b < 1e9 => format!("{:.0} MB", b / 1e6),
        b => format!("{:.0} GB", b / 1e9),
    }
}

/// A panel for each pass, a row for each peer and layout, a dot for each shape; f32 with the most threads.
pub fn peers(lines: &[Peer]) -> Result<String> {
    let most = most(lines.iter().map(|line| line.threads));
    let mut passes: Vec<&str> = lines.iter().map(|line| line.pass.as_str()).collect();
    passes.sort();
    passes.dedup();
    svg((520 * passes.len().max(1) as u32, 460), |sheet| {
        for (panel, pass) in sheet.split_evenly((1, passes.len().max(1))).iter().zip(&passes) {
            let mut dots = Dots::default();
            for line in lines.iter().filter(|l| l.pass == *pass && l.dtype == "f32" && l.threads == most) {
                let size = if line.shape.bytes() >= 16 << 20 { "16 MiB and more" } else { "less than 16 MiB" };
                dots.add(format!("{} {}", line.peer, line.layout), size, line.ratio);
            }
            dots.draw(panel, pass, &format!("times as fast as the peer, {}", threads(most)))?;
        }
        Ok(())
    })
}
