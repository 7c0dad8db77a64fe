//! What the pictures of the examples and benches share: the sheet, the colours and the look of a grid.

use plotters::chart::MeshStyle;
use plotters::coord::Shift;
use plotters::coord::ranged1d::Ranged;
use plotters::prelude::*;

pub type Panel<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Tell each other apart in print, and to most eyes.
pub const COLORS: [RGBColor; 5] = [
    RGBColor(0x1f, 0x5f, 0xa8),
    RGBColor(0xc4, 0x4e, 0x1c),
    RGBColor(0x3a, 0x8a, 0x4a),
    RGBColor(0x7a, 0x4a, 0x9a),
    RGBColor(0x80, 0x80, 0x80),
];

/// A white sheet of so many points, as SVG.
pub fn svg<E>(size: (u32, u32), draw: impl FnOnce(&Panel) -> Result<(), E>) -> Result<String, E>
where
    E: From<DrawingAreaErrorKind<std::io::Error>>,
{
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
    root.fill(&WHITE)?;
    draw(&root)?;
    root.present()?;
    drop(root);
    Ok(svg)
}

/// Few and light lines; sizes of the text of marks and of axes.
pub fn look<'a, 'b, 'm, 'svg, X: Ranged, Y: Ranged>(
    mesh: &'m mut MeshStyle<'a, 'b, X, Y, SVGBackend<'svg>>,
    [marks, axes]: [i32; 2],
) -> &'m mut MeshStyle<'a, 'b, X, Y, SVGBackend<'svg>> {
    mesh.light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .label_style(("sans-serif", marks))
        .axis_desc_style(("sans-serif", axes))
}
