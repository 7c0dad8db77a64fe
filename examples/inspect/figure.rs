//! The picture: mean, standard deviation and share of zeros of each channel, what is wrong in colour.

use crate::Result;
use crate::plot::{COLORS, Panel, look, svg};
use crate::statistics::{Channel, EXPLODING, Fault, Found};
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;
use std::ops::Range;

const FINE: RGBColor = COLORS[0];

fn color(fault: Option<Fault>) -> RGBColor {
    match fault {
        None => FINE,
        Some(Fault::Exploding) => COLORS[1],
        Some(Fault::Nan) => COLORS[3],
        Some(Fault::Infinite) => COLORS[2],
        Some(Fault::Dead) => COLORS[4],
    }
}

/// Three panels, one below the other, with the channels from left to right.
pub fn draw(title: &str, found: &Found) -> Result<String> {
    let faults: Vec<_> = Fault::ALL.into_iter().filter(|&fault| found.count(fault) > 0).collect();
    // What is fine fills the panels; what is not is drawn at their edges where it lies beyond.
    let reach = 3.0 * positive(found.median_rms, 1.0);
    let fine = || found.channels.iter().filter(|channel| channel.1.is_none()).map(|channel| &channel.0);
    let ends = fine().flat_map(|channel| [-1.0, 1.0].map(|side| channel.moments.mean + side * channel.std()));
    let (low, high) = ends.fold((0.0f64, 0.0f64), |(low, high), end| (low.min(end), high.max(end)));
    let means = low.max(-reach * EXPLODING) - 0.1 * reach..high.min(reach * EXPLODING) + 0.1 * reach;
    let middle = positive(found.median_std, 1.0);
    svg((1200, 900), |sheet| {
        let sheet = sheet.titled(title, ("sans-serif", 22))?;
        let (legend, panels) = sheet.split_vertically(26);
        name(&legend, &faults)?;
        let panels = panels.split_evenly((3, 1));
        bars(&panels[0], found, "mean, with std to either side", means)?;
        let stds = (middle / (50.0 * EXPLODING), middle * 50.0 * EXPLODING);
        let marks = |y: &f64| format!("{y:.0e}");
        let std = |channel: &Channel| channel.std();
        dots(&panels[1], found, "standard deviation", ((stds.0..stds.1).log_scale(), stds), &marks, std)?;
        let percent = |y: &f64| format!("{y:.0}");
        dots(&panels[2], found, "zeros, %", (0.0..100.0, (0.0, 100.0)), &percent, |channel| 100.0 * channel.zeros())
    })
}

/// The value if it can be the middle of an axis.
fn positive(value: f64, otherwise: f64) -> f64 {
    if (1e-290..1e290).contains(&value) { value } else { otherwise }
}

/// What the colours mean, in a line of its own.
fn name(panel: &Panel, faults: &[Fault]) -> Result<()> {
    let mut at = 80;
    for fault in [None].into_iter().chain(faults.iter().copied().map(Some)) {
        let name = fault.map_or("fine", Fault::name);
        panel.draw(&Circle::new((at, 12), 5, color(fault).filled()))?;
        panel.draw(&Text::new(name, (at + 12, 4), ("sans-serif", 16)))?;
        at += 40 + 9 * name.len() as i32;
    }
    panel.draw(&Circle::new((at, 12), 5, BLACK.stroke_width(2)))?;
    panel.draw(&Text::new("ring: beyond the edge", (at + 12, 4), ("sans-serif", 16)))?;
    Ok(())
}

/// The area of a panel under axes of its own, and its grid drawn.
macro_rules! axes {
    ($panel:expr, $found:expr, $name:expr, $values:expr, $marks:expr) => {{
        let channels = -0.5..$found.channels.len() as f64 - 0.5;
        let mut chart = ChartBuilder::on($panel)
            .margin(10)
            .x_label_area_size(36)
            .y_label_area_size(70)
            .build_cartesian_2d(channels, $values)?;
        look(&mut chart.configure_mesh(), [14, 16])
            .x_desc("channel")
            .y_desc($name)
            .x_label_formatter(&|channel| format!("{channel:.0}"))
            .y_label_formatter($marks)
            .y_labels(6)
            .draw()?;
        chart
    }};
}

fn bars(panel: &Panel, found: &Found, name: &str, values: Range<f64>) -> Result<()> {
    let plain = (0.1..1e4).contains(&(values.end - values.start));
    let marks = |y: &f64| if plain { format!("{y:.2}") } else { format!("{y:.1e}") };
    let mut chart = axes!(panel, found, name, values.clone(), &marks);
    let inside = |y: f64| y.clamp(values.start, values.end);
    for (i, (channel, fault)) in found.channels.iter().enumerate() {
        let (mean, std, color) = (channel.moments.mean, channel.std(), color(*fault));
        if !(mean.is_finite() && std.is_finite()) {
            // Not a place, but a channel.
            chart.draw_series([Cross::new((i as f64, values.start), 4, color.stroke_width(2))])?;
            continue;
        }
        let ends = [mean - std, mean + std].map(|y| (i as f64, inside(y)));
        chart.draw_series(LineSeries::new(ends, color.stroke_width(2)))?;
        chart.draw_series([mark(i, mean, (values.start, values.end), color)])?;
    }
    Ok(())
}

/// A dot, or a ring at an edge of the panel for a value beyond it, and at the lower one for none.
fn mark(channel: usize, value: f64, (low, high): (f64, f64), color: RGBColor) -> Circle<(f64, f64), i32> {
    let shown = if value.is_nan() { low } else { value.clamp(low, high) };
    let style = if shown == value { color.filled() } else { color.stroke_width(2) };
    Circle::new((channel as f64, shown), 3, style)
}

/// A dot for each channel, a ring at an edge where its value lies beyond or is none.
fn dots<Y>(
    panel: &Panel,
    found: &Found,
    name: &str,
    (axis, ends): (Y, (f64, f64)),
    marks: &dyn Fn(&f64) -> String,
    value: impl Fn(&Channel) -> f64,
) -> Result<()>
where
    Y: AsRangedCoord<Value = f64>,
    Y::CoordDescType: ValueFormatter<f64>,
{
    let mut chart = axes!(panel, found, name, axis, marks);
    let dots = found.channels.iter().enumerate();
    chart.draw_series(dots.map(|(i, (channel, fault))| mark(i, value(channel), ends, color(*fault))))?;
    Ok(())
}
