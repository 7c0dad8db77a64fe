//! What is printed.

use crate::Result;
use crate::dump::{Extent, Tensor};
use crate::statistics::{DEAD, EXPLODING, Fault, Found};
use std::io::Write;

/// The channels of a tensor, the worst first, and how many are bad.
pub fn channels(out: &mut impl Write, tensor: &Tensor, extent: Extent, found: &Found, rows: usize) -> Result<()> {
    let count = found.channels.first().map_or(0, |channel| channel.0.moments.count);
    let all = found.channels.len();
    writeln!(out, "{}: {all} channels, {count} values each", tensor.title())?;
    writeln!(out, "{}\n", extent.told(tensor))?;
    writeln!(
        out,
        "{:>8}{:>12}{:>12}{:>12}{:>12}{:>9}{:>10}{:>10}",
        "channel", "mean", "std", "min", "max", "zeros, %", "NaNs", "infinite"
    )?;
    for i in found.worst_first().into_iter().take(rows) {
        let (channel, fault) = &found.channels[i];
        let [min, max] = channel.range();
        let numbers = [channel.moments.mean, channel.std(), min, max].map(number).concat();
        let zeros = format!("{:.1}", 100.0 * channel.zeros());
        let name = fault.map_or("", Fault::name);
        let line = format!("{i:>8}{numbers}{zeros:>9}{:>10}{:>10}  {name}", channel.nans, channel.infinities);
        writeln!(out, "{}", line.trim_end())?;
    }
    if rows < all {
        writeln!(out, "{:>8} {} more, nearer the median channel: --rows {all} shows all", "...", all - rows)?;
    }
    let median = match found.median_std.is_nan() {
        true => "No channel is alive and finite, so there is no median to compare with".into(),
        false => {
            let [std, rms] = [found.median_std, found.median_rms].map(number);
            format!("Median channel: std {}, root mean square {}", std.trim(), rms.trim())
        }
    };
    writeln!(out, "\n{}. {median}.", summary(found))?;
    writeln!(
        out,
        "Exploding: a root mean square over {EXPLODING} times that of the median channel.\n\
         Dead: constant, or a std below {DEAD} times that of the median channel."
    )?;
    Ok(())
}

/// A line for each tensor of a file.
pub fn tensors<'a>(
    out: &mut impl Write,
    file: &str,
    tensors: impl Iterator<Item = (&'a Tensor, Result<(Extent, Found)>)>,
) -> Result<()> {
    writeln!(out, "{file}:\n")?;
    for (tensor, found) in tensors {
        match found {
            Ok((extent, found)) => {
                writeln!(out, "{}: dimension {}, {}", tensor.title(), extent.axis + 1, summary(&found))?
            }
            Err(e) => writeln!(out, "{}: left out: it {e}", tensor.title())?,
        }
    }
    writeln!(
        out,
        "\n--tensor NAME shows the channels of one, with a picture; --layout tells where they are, if not in dimension 2."
    )?;
    Ok(())
}

/// "32 channels: 1 NaN, 2 dead".
fn summary(found: &Found) -> String {
    let bad = Fault::ALL.into_iter().filter_map(|fault| match found.count(fault) {
        0 => None,
        count => Some(format!("{count} {}", fault.name())),
    });
    let bad: Vec<_> = bad.collect();
    let bad = if bad.is_empty() { "none of them dead, exploding or without numbers".into() } else { bad.join(", ") };
    format!("{} channels: {bad}", found.channels.len())
}

/// Five digits, however large.
fn number(value: f64) -> String {
    match value.abs() {
        size if size == 0.0 || (1e-3..1e5).contains(&size) => format!("{value:>12.4}"),
        _ if value.is_finite() => format!("{value:>12.3e}"),
        _ => format!("{value:>12}"),
    }
}
