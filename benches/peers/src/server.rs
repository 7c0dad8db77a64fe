//! Peers in other languages: child processes that answer a line for a line.
//!
//! | request | answer after `ok`, or `error` and why |
//! |---|---|
//! | (none; at the start) | version |
//! | `setup PASS DTYPE N C H W THREADS DIRECTORY` | implementation; the inputs are in the directory |
//! | `result` | nothing; runs once, and writes y, or dx, dgamma and dbeta, into the directory as f32 in NCHW |
//! | `time CALLS` | microseconds per call, after as many that are not timed |

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::contestant::{About, Contestant};
use crate::problem::{Dtype, Inputs, Outputs, Pass, Problem, Size, read_outputs};

pub struct Server {
    about: About,
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
    directory: PathBuf,
    pass: Pass,
}

impl Server {
    /// Starts `command` with the layout as its last argument. Inputs and outputs are exchanged in `directory`.
    pub fn start(peer: &'static str, layout: &'static str, command: &[&Path], directory: &Path) -> Result<Self> {
        let mut child = Command::new(command[0])
            .args(&command[1..])
            .arg(layout)
            // Threads that spin for work are theirs to gain while they are timed, and must not be the next one's to lose:
            // this is a fraction of a millisecond, where the default is several.
            .env("GOMP_SPINCOUNT", "20000")
            // A core for each thread; see `pinned`.
            .envs([("OMP_PLACES", "cores"), ("OMP_PROC_BIND", "true")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", command[0].display()))?;
        let (requests, answers) = child.stdin.take().zip(child.stdout.take()).context("pipes were asked for")?;
        let about = About { peer, version: String::new(), layout };
        let answers = BufReader::new(answers);
        let mut server = Self { about, child, requests, answers, directory: directory.into(), pass: Pass::Forward };
        server.about.version = server.answer()?;
        Ok(server)
    }

    fn ask(&mut self, request: &str) -> Result<String> {
        writeln!(self.requests, "{request}").context("the server has gone")?;
        self.answer()
    }

    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        match line.trim_end().split_once(' ').unwrap_or((line.trim_end(), "")) {
            ("ok", answer) => Ok(answer.into()),
            ("error", why) => bail!("{why}"),
            _ => bail!("the server ended, or said {line:?}"),
        }
    }
}

impl Contestant for Server {
    fn about(&self) -> &About {
        &self.about
    }

    fn serves(&self, problem: &Problem) -> bool {
        // oneDNN has no fast path for bf16 in plain NCHW.
        let slow = (self.about.peer, self.about.layout, problem.dtype) == ("oneDNN", "NCHW", Dtype::Bf16);
        problem.pass != Pass::Step && !slow
    }

    fn setup(&mut self, problem: &Problem, _: &Inputs) -> Result<String> {
        let Problem { pass, dtype, size: Size { n, c, h, w }, threads } = *problem;
        self.pass = pass;
        let directory = self.directory.display();
        self.ask(&format!("setup {} {} {n} {c} {h} {w} {threads} {directory}", pass.name(), dtype.name()))
    }

    fn result(&mut self) -> Result<Outputs> {
        self.ask("result")?;
        read_outputs(self.pass, &self.directory)
    }

    fn time(&mut self, calls: usize) -> Result<f64> {
        let answer = self.ask(&format!("time {calls}"))?;
        answer.parse().with_context(|| format!("{answer:?} is no time"))
    }

    // The next problem takes the place of this one.
    fn clear(&mut self) {}

    fn process(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
