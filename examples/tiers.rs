//! Prints the SIMD tiers that this machine has, one a line, the widest last.

fn main() {
    batchnorm::Tier::available().for_each(|tier| println!("{tier}"));
}
