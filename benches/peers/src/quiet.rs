//! Whether the machine was ours alone: threads that wait for each other lose far more than their share to a neighbour.

use std::fs::read_to_string;

/// What the processors did since the machine was started, in ticks of the kernel.
pub struct Ticks {
    all: u64,
    others: u64,
}

impl Ticks {
    /// The time up to now; `processes` are not others. Nothing where there is no /proc.
    pub fn now(processes: &[u32]) -> Option<Self> {
        let stat = read_to_string("/proc/stat").ok()?;
        // user, nice, system, idle, iowait, irq, softirq, and steal, which is what other virtual machines took.
        let columns: Vec<u64> =
            stat.lines().next()?.split_whitespace().skip(1).take(8).flat_map(|t| t.parse()).collect();
        let (all, idle) = (columns.iter().sum::<u64>(), columns.get(3)? + columns.get(4)?);
        let own: u64 = processes.iter().filter_map(|&process| used(process)).sum();
        Some(Self { all, others: (all - idle).saturating_sub(own) })
    }

    /// Whether others took little since `self`, as far as ticks can tell.
    pub fn quiet_until(&self, later: &Self) -> bool {
        let (all, others) = (later.all - self.all, later.others.saturating_sub(self.others));
        others <= 3 + all / 30
    }
}

/// Ticks that a process used, in user mode and in the kernel.
fn used(process: u32) -> Option<u64> {
    let stat = read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name, in parentheses, may contain anything; the state follows it as the third field, and these are 14 and 15.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
}
