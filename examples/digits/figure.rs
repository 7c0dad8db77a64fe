//! The pictures: accuracy against steps, and the percentiles of a sigmoid's input; ways to normalize side by side.

use crate::experiment::{PERCENTILES, Point};
use crate::plot::{COLORS, Panel, look, svg};
use crate::{Pair, Result};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::ops::Range;

const WITHOUT: RGBColor = COLORS[1];
const WITH: RGBColor = COLORS[0];

const STEPS: &str = "training steps";

/// Draws one pair of runs, laid out like Figure 1 of the paper, as SVG.
pub fn draw(pair: &Pair) -> Result<String> {
    let [without, with] = pair;
    let range = input_range(pair);
    svg((1200, 400), |sheet| {
        let panels = sheet.split_evenly((1, 3));
        accuracies(&panels[0], pair)?;
        inputs(&panels[1], "(b) without BN", WITHOUT, without, &range)?;
        inputs(&panels[2], "(c) with BN", WITH, with, &range)
    })
}

fn accuracies(panel: &Panel, [without, with]: &Pair) -> Result<()> {
    let lines = [("without BN", WITHOUT, without), ("with BN", WITH, with)];
    let lines = lines.map(|(label, color, points)| Line {
        label: label.into(),
        style: color.stroke_width(2),
        points: points.iter().map(|p| (p.step as f64, 100.0 * p.accuracy)).collect(),
    });
    let titles = ["(a) with and without BN", STEPS, "test accuracy, %"];
    chart(panel, titles, 0.0..100.0, &lines, true)
}

fn inputs(panel: &Panel, title: &str, color: RGBColor, points: &[Point], range: &Range<f64>) -> Result<()> {
    let lines = [0, 1, 2].map(|i| Line {
        label: format!("{}th", PERCENTILES[i]),
        style: color.stroke_width(if i == 1 { 2 } else { 1 }),
        points: points
            .iter()
            .map(|p| (p.step as f64, f64::from(p.input[i])))
            // What is not a number has no place in a picture.
            .filter(|p| p.1.is_finite())
            .collect(),
    });
    let titles = [title, STEPS, "input of one sigmoid, percentiles"];
    chart(panel, titles, range.clone(), &lines, false)
}

/// One vertical range for the two panels that are to be compared.
fn input_range(pair: &Pair) -> Range<f64> {
    let inputs = pair.iter().flatten().flat_map(|p| p.input);
    let finite = inputs.map(f32::abs).filter(|x| x.is_finite());
    let top = 1.1 * f64::from(finite.fold(1.0, f32::max));
    -top..top
}

/// Draws ways to normalize beside each other, by step and by second, and what becomes of a bias.
pub fn compare(runs: &[(&str, Vec<Point>)], growth: &[(&str, Vec<f64>)]) -> Result<String> {
    let line = |(label, points): (&str, Vec<(f64, f64)>), color: RGBColor| Line {
        label: label.into(),
        style: color.stroke_width(2),
        points,
    };
    let accuracies = |at: fn(&Point) -> f64| -> Vec<Line> {
        let runs = runs
            .iter()
            .map(|(label, points)| (*label, points.iter().map(|point| (at(point), 100.0 * point.accuracy)).collect()));
        runs.zip(COLORS).map(|(run, color)| line(run, color)).collect()
    };
    let growth: Vec<Line> = (growth.iter())
        .map(|(label, sizes)| (*label, sizes.iter().enumerate().map(|(step, &size)| (step as f64, size)).collect()))
        .zip([WITHOUT, WITH])
        .map(|(run, color)| line(run, color))
        .collect();
    let top = growth.iter().flat_map(|line| &line.points).fold(1.0, |top: f64, point| top.max(1.1 * point.1));
    let accuracy = "test accuracy, %";
    svg((1200, 400), |sheet| {
        let panels = sheet.split_evenly((1, if growth.is_empty() { 2 } else { 3 }));
        chart(&panels[0], ["(a) by step", STEPS, accuracy], 0.0..100.0, &accuracies(|p| p.step as f64), true)?;
        chart(
            &panels[1],
            ["(b) by second", "seconds of training", accuracy],
            0.0..100.0,
            &accuracies(|p| p.seconds),
            true,
        )?;
        match panels.get(2) {
            Some(panel) => chart(panel, ["(c) a bias before whitening", STEPS, "its length"], 0.0..top, &growth, true),
            None => Ok(()),
        }
    })
}

struct Line {
    label: String,
    style: ShapeStyle,
    points: Vec<(f64, f64)>,
}

/// One panel, its lines named in a legend or else at their right ends.
fn chart(
    panel: &Panel,
    [title, horizontal, vertical]: [&str; 3],
    range: Range<f64>,
    lines: &[Line],
    legend: bool,
) -> Result<()> {
    let points = lines.iter().flat_map(|line| &line.points);
    let end = points.map(|p| p.0).fold(f64::MIN_POSITIVE, f64::max);
    let decimals = usize::from(range.end < 10.0);
    // Names at the ends keep this distance where the lines, given from low to high, do not.
    let distance = 0.055 * (range.end - range.start);
    let mut free = f64::NEG_INFINITY;
    let mut chart = ChartBuilder::on(panel)
        .margin(12)
        .margin_right(44)
        .caption(title, ("sans-serif", 22))
        .x_label_area_size(44)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..end, range)?;
    look(&mut chart.configure_mesh(), [16, 17])
        .x_desc(horizontal)
        .y_desc(vertical)
        .x_labels(6)
        .y_labels(6)
        .x_label_formatter(&|x| format!("{x}"))
        .y_label_formatter(&|y| format!("{y:.decimals$}"))
        .draw()?;
    for line in lines {
        let style = line.style;
        let drawn = chart.draw_series(LineSeries::new(line.points.iter().copied(), style))?;
        if legend {
            drawn.label(line.label.as_str()).legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style));
        } else if let Some(&(step, value)) = line.points.last() {
            let value = value.max(free);
            free = value + distance;
            let text =
                ("sans-serif", 16).into_text_style(panel).color(&style.color).pos(Pos::new(HPos::Left, VPos::Center));
            let label = EmptyElement::at((step, value)) + Text::new(line.label.clone(), (5, 0), text);
            chart.draw_series([label])?;
        }
    }
    if legend {
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::MiddleRight)
            .label_font(("sans-serif", 17))
            .draw()?;
    }
    Ok(())
}
