//! A made-up dump of activations to try: most channels as they should be, some not.

use crate::Result;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::fs;
use std::path::Path;

/// N, C, H and W.
const SIZES: [usize; 4] = [16, 32, 14, 14];

/// Writes it, over nothing but itself.
pub fn write(path: &Path) -> Result<()> {
    let dump = bytes();
    if fs::read(path).is_ok_and(|there| there != dump) {
        return Err(format!("{}: there is such a file already; name another one for --demo", path.display()).into());
    }
    fs::write(path, dump).map_err(|e| format!("{}: {e}", path.display()).into())
}

/// The outputs of a ReLU, in f32, as numpy.save writes them. The channels 3 and 21 are dead, 8 and 17 explode, 13 has a NaN and
/// 28 an infinity.
fn bytes() -> Vec<u8> {
    let [n, c, h, w] = SIZES;
    let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({n}, {c}, {h}, {w}), }}");
    // Filled up so that the numbers begin at a multiple of 64.
    let length = (10 + header.len() + 1).next_multiple_of(64) - 10;
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((length as u16).to_le_bytes());
    bytes.extend(format!("{header:<0$}\n", length - 1).bytes());
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let channels: Vec<_> = (0..c).map(|_| (rng.random_range(-0.5..0.5f32), rng.random_range(0.5..2.0f32))).collect();
    for sample in 0..n {
        for (channel, (offset, scale)) in channels.iter().enumerate() {
            for position in 0..h * w {
                let normal = (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0;
                let value = (offset + scale * normal).max(0.0);
                let first = sample == 0 && position == 0;
                bytes.extend(
                    match channel {
                        3 => 0.0,
                        8 => 300.0 * value,
                        13 if first => f32::NAN,
                        17 => 150.0 + value,
                        21 => 0.25,
                        28 if first => f32::INFINITY,
                        _ => value,
                    }
                    .to_le_bytes(),
                );
            }
        }
    }
    bytes
}
