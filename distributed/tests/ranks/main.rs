//! Every case on 1, 2, 3, 4 and 8 ranks: this program starts itself under mpirun, and each rank runs the case.
//!
//! `cargo test -p batchnorm-mpi --all-features -- shards` runs the cases with that name alone.

#[path = "../../../tests/common/mod.rs"]
mod common;
#[path = "../../../tests/counting/mod.rs"]
mod counting;
#[path = "../../../tests/exact/mod.rs"]
mod exact;
mod numbers;
mod refusals;
mod support;
mod variants;

use std::process::{Command, ExitCode, Output};
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};
use mpi::Threading;
use mpi::topology::SimpleCommunicator;
use mpi::traits::*;

/// A case: what each rank runs. It returns the bits of its results, which a second run must repeat, if there are any.
type Case = fn(&SimpleCommunicator) -> Vec<u64>;

const CASES: [(&str, Case); 17] = [
    ("shards_even", |world| numbers::shards(world, support::Cut::Even)),
    ("shards_ascending", |world| numbers::shards(world, support::Cut::Ascending)),
    ("shards_of_one_value", |world| numbers::shards(world, support::Cut::OneEach)),
    ("shards_empty", |world| numbers::shards(world, support::Cut::Gaps)),
    ("rank_order_fixes_the_bits", numbers::rank_order),
    ("one_rank_has_the_bits_of_the_core", numbers::alone),
    ("groups", numbers::groups),
    ("running_statistics", numbers::running),
    ("other_work_meanwhile", numbers::meanwhile),
    ("nothing_is_allocated", numbers::allocations),
    ("variants", variants::all),
    ("masks", variants::masks),
    ("frozen", variants::frozen),
    ("disagreement", refusals::disagreement),
    ("arguments_wrong_on_one_rank", refusals::arguments),
    ("no_values_on_any_rank", refusals::no_values),
    ("plans_for_other_batches", refusals::plans),
];

/// Deaths of the last rank while the others wait in a collective, each with what mpirun says of it.
const DEATHS: [(&str, fn() -> !, &str); 2] = [
    ("dies_of_a_signal", || std::process::abort(), "process rank {rank} "),
    ("exits", || std::process::exit(3), ",{rank}]\n  Exit code:    3"),
];

/// The first argument of a rank.
const RANK: &str = "--as-a-rank-in-case";
/// More than any case takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    if words.next().as_deref() == Some(RANK) {
        rank(&words.next().expect("the name of a case"));
        return ExitCode::SUCCESS;
    }
    let mut arguments = Arguments::from_args();
    // The machine is full with the ranks of one case.
    arguments.test_threads.get_or_insert(1);
    let mut trials = Vec::new();
    for ranks in [1, 2, 3, 4, 8] {
        for (name, _) in CASES {
            trials.push(Trial::test(format!("{name}::ranks_{ranks}"), move || repeated(name, ranks)));
        }
        for (name, _, message) in DEATHS {
            if ranks > 1 {
                trials.push(Trial::test(format!("{name}::ranks_{ranks}"), move || death(name, ranks, message)));
            }
        }
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// What a rank does.
fn rank(name: &str) {
    // A rank that panics would wait in MPI_Finalize for those that wait for it.
    std::panic::set_hook(Box::new(|info| {
        eprintln!("{info}");
        if !support::panics_are_expected() {
            std::process::abort();
        }
    }));
    let (universe, _) = mpi::initialize_with_threading(Threading::Funneled).unwrap();
    let world = universe.world();
    if let Some((_, die, _)) = DEATHS.iter().find(|(death, ..)| *death == name) {
        refusals::die(&world, *die);
    }
    let (_, case) = CASES.iter().find(|(case, _)| *case == name).unwrap();
    let bits = case(&world);
    let digests = support::gather(&world, support::digest(&bits));
    if world.rank() == 0 && !bits.is_empty() {
        println!("{digests:x?}");
    }
}

/// Runs a case under mpirun.
fn launch(name: &str, ranks: usize) -> Result<Output, Failed> {
    let mut mpirun = Command::new("mpirun");
    // Open MPI asks for leave to run as root and for more ranks than cores, and looks long for networks, of which one machine
    // needs none. Other libraries do not look at these.
    mpirun.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
    mpirun.envs([("OMPI_MCA_rmaps_base_oversubscribe", "1"), ("OMPI_MCA_pml", "ob1")]);
    mpirun.arg("-n").arg(ranks.to_string()).args(["--timeout", &LIMIT.as_secs().to_string()]);
    Ok(mpirun.arg(std::env::current_exe()?).args([RANK, name]).output().map_err(|e| format!("mpirun: {e}"))?)
}

/// A case that must end well, with the same bits in a second run.
fn repeated(name: &str, ranks: usize) -> Result<(), Failed> {
    let run = || {
        let output = launch(name, ranks)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match output.status.success() {
            true => Ok(text(&output.stdout)),
            false => Err(Failed::from(format!("{}\n{}", output.status, text(&output.stderr)))),
        }
    };
    let first = run()?;
    let second = if first.is_empty() { String::new() } else { run()? };
    if first != second {
        return Err(format!("two runs differ:\n{first}{second}").into());
    }
    Ok(())
}

/// The death of one rank must end the job soon, with a message that names it.
fn death(name: &str, ranks: usize, message: &str) -> Result<(), Failed> {
    let begin = Instant::now();
    let output = launch(name, ranks)?;
    let said = String::from_utf8_lossy(&output.stderr);
    let expected = message.replace("{rank}", &(ranks - 1).to_string());
    if output.status.success() || begin.elapsed() > Duration::from_secs(30) || !said.contains(&expected) {
        let took = begin.elapsed();
        return Err(format!("{} after {took:?}, expected {expected:?} in\n{said}", output.status).into());
    }
    Ok(())
}
