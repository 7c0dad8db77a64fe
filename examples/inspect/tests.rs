//! Files of every kind, read and counted, against plain arithmetic in f64; what is called bad; and the words for mistakes.

use super::*;
use dump::Number;
use safetensors::tensor::{Dtype, TensorView, serialize};
use statistics::{Fault, Piece, STRETCH, pieces};
use std::path::Path;

/// A folder that goes when the test does.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("batchnorm-inspect-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

fn npy(descr: &str, fortran: bool, sizes: &[usize], data: &[u8]) -> Vec<u8> {
    let sizes: String = sizes.iter().map(|size| format!("{size}, ")).collect();
    let fortran = if fortran { "True" } else { "False" };
    let header = format!("{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': ({}), }}   \n", sizes.trim_end());
    [b"\x93NUMPY\x01\x00", &(header.len() as u16).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// Values that every type holds: quarters, zeros among them.
fn values(len: usize) -> Vec<f64> {
    (0..len).map(|i| ((i * 7919 + 13) % 61) as f64 / 4.0 - 5.0).collect()
}

fn bytes(number: Number, values: &[f64]) -> Vec<u8> {
    let of = |&value: &f64| match number {
        Number::F16 => half::f16::from_f64(value).to_le_bytes().to_vec(),
        Number::Bf16 => half::bf16::from_f64(value).to_le_bytes().to_vec(),
        Number::F32 => (value as f32).to_le_bytes().to_vec(),
        Number::F64 => value.to_le_bytes().to_vec(),
    };
    values.iter().flat_map(of).collect()
}

/// The values of each channel, found by index.
fn by_channel(values: &[f64], sizes: &[usize], axis: usize, fortran: bool) -> Vec<Vec<f64>> {
    let mut channels = vec![vec![]; sizes[axis]];
    for (mut i, &value) in values.iter().enumerate() {
        let mut index = vec![0; sizes.len()];
        let order: Vec<_> = if fortran { (0..sizes.len()).collect() } else { (0..sizes.len()).rev().collect() };
        for d in order {
            index[d] = i % sizes[d];
            i /= sizes[d];
        }
        channels[index[axis]].push(value);
    }
    channels
}

fn assert_channels(what: &str, got: &Channels, expected: &[Vec<f64>]) {
    assert_eq!(got.0.len(), expected.len(), "{what}");
    for (got, values) in got.0.iter().zip(expected) {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let var = values.iter().map(|value| (value - mean) * (value - mean)).sum::<f64>() / n;
        assert_eq!(got.moments.count, values.len() as u64, "{what}");
        // What the crate promises of f32.
        assert!((got.moments.mean - mean).abs() <= 1e-7 * var.sqrt(), "{what}: {} not {mean}", got.moments.mean);
        assert!((got.moments.variance() - var).abs() <= 1e-6 * var, "{what}: {} not {var}", got.moments.variance());
        let ends = values.iter().fold((f64::MAX, f64::MIN), |(low, high), &v| (low.min(v), high.max(v)));
        assert_eq!((got.min, got.max), ends, "{what}");
        assert_eq!(got.zeros, values.iter().filter(|&&value| value == 0.0).count() as u64, "{what}");
        assert_eq!((got.nans, got.infinities), (0, 0), "{what}");
    }
}

fn measured(path: &Path, layout: Option<&str>, most: usize) -> Vec<Channels> {
    let dump = Dump::open(path).unwrap();
    let of = |tensor: &Tensor| {
        let read = std::cell::Cell::new(0);
        let extent = tensor.extent(layout).unwrap();
        let found = statistics::measure(&dump, tensor, extent, most, |bytes| read.set(read.get() + bytes)).unwrap();
        assert_eq!(read.get(), tensor.bytes());
        found
    };
    dump.tensors.iter().map(of).collect()
}

#[test]
fn statistics_are_those_of_plain_arithmetic() {
    let folder = Folder::new("statistics");
    let layouts: [(&[usize], &str); 6] = [
        (&[13, 5], "nc"),
        (&[6, 5, 17], "ncl"),
        (&[6, 17, 5], "nlc"),
        (&[4, 6, 5, 7], "nchw"),
        (&[4, 5, 7, 6], "nhwc"),
        (&[3, 4, 2, 5, 3], "ncdhw"),
    ];
    for (sizes, letters) in layouts {
        let axis = letters.find('c').unwrap();
        let values = values(sizes.iter().product());
        for (number, descr) in [(Number::F16, "'<f2'"), (Number::F32, "'<f4'"), (Number::F64, "'<f8'")] {
            for fortran in [false, true] {
                let path = folder.write("dump.npy", &npy(descr, fortran, sizes, &bytes(number, &values)));
                let expected = by_channel(&values, sizes, axis, fortran);
                for most in [1, 7, 50, 200, STRETCH] {
                    let what = format!("{letters} {number:?} {fortran} {most}");
                    assert_channels(&what, &measured(&path, Some(letters), most)[0], &expected);
                }
                if axis == 1 {
                    assert_channels("the second", &measured(&path, None, STRETCH)[0], &expected);
                }
            }
        }
        let types = [Dtype::F16, Dtype::BF16, Dtype::F32, Dtype::F64];
        let numbers = [Number::F16, Number::Bf16, Number::F32, Number::F64];
        let data = numbers.map(|number| bytes(number, &values));
        let views = types
            .iter()
            .zip(&data)
            .map(|(&dtype, data)| (format!("{dtype:?}"), TensorView::new(dtype, sizes.to_vec(), data).unwrap()));
        let path = folder.write("dump.safetensors", &serialize(views.collect::<Vec<_>>(), None).unwrap());
        let found = measured(&path, Some(letters), 50);
        assert_eq!(found.len(), 4);
        found.iter().for_each(|found| {
            assert_channels(letters, found, &by_channel(&values, sizes, axis, false));
        });
    }
}

#[test]
fn what_is_no_number_is_counted_and_stays_in_its_channel() {
    let folder = Folder::new("special");
    let mut values = values(4 * 3 * 5);
    let (nan, infinite) = (5 + 2, 15 + 10 + 1);
    let clean = by_channel(&values, &[4, 3, 5], 1, false);
    (values[nan], values[infinite]) = (f64::NAN, f64::NEG_INFINITY);
    let path = folder.write("dump.npy", &npy("'<f4'", false, &[4, 3, 5], &bytes(Number::F32, &values)));
    for most in [1, 6, STRETCH] {
        let found = measured(&path, None, most).remove(0);
        assert_eq!(found.0.iter().map(|c| (c.nans, c.infinities)).collect::<Vec<_>>(), [(0, 0), (1, 0), (0, 1)]);
        assert!(found.0[1].moments.mean.is_nan() && found.0[1].min.is_finite() && found.0[1].max.is_finite());
        assert_eq!(found.0[2].min, f64::NEG_INFINITY);
        assert_channels("beside", &Channels(found.0[..1].to_vec()), &clean[..1]);
        let faults: Vec<_> = found.judge().channels.iter().map(|channel| channel.1).collect();
        assert_eq!(faults, [None, Some(Fault::Nan), Some(Fault::Infinite)]);
        assert_eq!(found.judge().worst_first(), [1, 2, 0]);
    }
}

#[test]
fn pieces_cover_a_tensor_in_order() {
    for (outer, channels, inner) in [(5, 3, 7), (1, 1, 1), (4, 6, 1), (1, 3, 40), (9, 1, 2)] {
        for most in [1, 2, 3, 7, 10, 21, 50, 1000] {
            let mut at = 0;
            for Piece { outer: o, channels: c, inner: i } in pieces(Extent { outer, channels, inner, axis: 1 }, most) {
                assert!((1..=most).contains(&(o * c.len() * i)));
                assert_eq!(at / inner % channels, c.start);
                // Contiguous: what is not whole is alone in its dimension.
                assert!((c.len() == channels || o == 1) && (i == inner || (o, c.len()) == (1, 1)));
                at += o * c.len() * i;
            }
            assert_eq!(at, outer * channels * inner);
        }
    }
}

/// Three values for each of the channels.
fn of(channels: &[[f64; 3]]) -> Channels {
    let folder = Folder::new("of");
    let data = bytes(Number::F64, &channels.concat());
    let path = folder.write("dump.npy", &npy("'<f8'", false, &[1, channels.len(), 3], &data));
    measured(&path, None, STRETCH).remove(0)
}

#[test]
fn dead_and_exploding_are_told_by_the_median_channel() {
    let fine = [-1.0, 0.0, 1.0];
    let faults = |channels: &[[f64; 3]]| of(channels).judge().channels.iter().map(|c| c.1).collect::<Vec<_>>();
    let (dead, exploding) = (Some(Fault::Dead), Some(Fault::Exploding));
    // Each side of the limits: a constant, little deviation, a far mean, much deviation.
    let channels = [fine, fine, fine, [0.0; 3], [0.5; 3], [1e-5, 2e-5, 3e-5], [1e-3, 2e-3, 3e-3]];
    assert_eq!(faults(&channels), [None, None, None, dead, dead, dead, None]);
    let channels = [[16.0, 15.0, 17.0], [20.0, 19.0, 21.0], [0.0, 0.0, 28.0], [0.0, 0.0, 60.0], fine, fine, fine, fine];
    assert_eq!(faults(&channels), [None, exploding, None, exploding, None, None, None, None]);
    // Most of them dead, or all.
    assert_eq!(faults(&[[0.0; 3], [0.0; 3], fine]), [dead, dead, None]);
    assert_eq!(faults(&[[0.0; 3], [7.0; 3]]), [dead, dead]);
    assert_eq!(
        of(&[fine, [0.0; 3], [90.0, 91.0, 92.0], [-2.0, 0.0, 2.0], fine]).judge().worst_first(),
        [2, 1, 3, 0, 4]
    );
}

fn args(words: &[&str]) -> Args {
    Args::try_parse_from([&["inspect"], words].concat()).unwrap()
}

fn printed(words: &[&str]) -> Result<String> {
    let mut out = Vec::new();
    run(&args(words), &mut out)?;
    Ok(String::from_utf8(out)?)
}

#[test]
fn the_demo_shows_what_was_made_wrong() {
    let folder = Folder::new("demo");
    let [file, picture] = ["demo.npy", "demo.svg"].map(|name| folder.0.join(name).display().to_string());
    let text = printed(&["--demo", &file, "--out", &picture]).unwrap();
    assert!(text.contains("32 channels: 1 NaN, 1 infinite, 2 exploding, 2 dead"), "{text}");
    assert!(text.contains("array, 16 x 32 x 14 x 14 f32: 32 channels, 3136 values each"), "{text}");
    let mut bad =
        [(3, "dead"), (8, "exploding"), (13, "NaN"), (17, "exploding"), (21, "dead"), (28, "infinite")].to_vec();
    let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    let is_number = |word: Option<&&str>| word.is_some_and(|word| word.parse::<f64>().is_ok());
    let rows: Vec<_> = rows.iter().filter(|row| is_number(row.first()) && is_number(row.get(1))).collect();
    assert_eq!(rows.len(), 20);
    let mut first: Vec<_> = rows[..bad.len()].iter().map(|row| (row[0].parse().unwrap(), row[8])).collect();
    assert!(rows[bad.len()..].iter().all(|row| row.len() == 8), "{text}");
    bad.sort();
    first.sort();
    assert_eq!(first, bad, "{text}");

    let svg = fs::read_to_string(&picture).unwrap();
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>") && svg.contains("exploding"));
    // In two panels a dot for each channel; in the third one where there is a mean; one for each name, and a ring.
    assert_eq!(svg.matches("<circle").count(), 32 + 32 + 30 + 5 + 1);

    // Again, as a file like any other, and never over another file.
    assert_eq!(printed(&["--demo", &file, "--out", &picture]).unwrap(), text);
    assert_eq!(printed(&[&file, "--out", &picture]).unwrap(), text);
    assert!(printed(&[&file, "--out", &picture, "--rows", "32"]).unwrap().lines().count() > text.lines().count());
    fs::write(&file, "mine").unwrap();
    let refused = printed(&["--demo", &file, "--out", &picture]).unwrap_err().to_string();
    assert!(refused.contains("already"), "{refused}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
}

#[test]
fn of_several_tensors_each_gets_a_line() {
    let folder = Folder::new("several");
    let data = bytes(Number::F32, &values(24));
    let view = |dtype, sizes: &[usize]| TensorView::new(dtype, sizes.to_vec(), &data).unwrap();
    let tensors = [
        ("conv.out", view(Dtype::F32, &[2, 4, 3])),
        ("conv.bias", view(Dtype::F32, &[24])),
        ("steps", view(Dtype::I32, &[12, 2])),
    ];
    let file = folder.write("dump.safetensors", &serialize(tensors.clone(), None).unwrap()).display().to_string();
    let picture = folder.0.join("picture.svg").display().to_string();
    let text = printed(&[&file, "--out", &picture]).unwrap();
    assert!(text.contains("conv.out, 2 x 4 x 3 f32: dimension 2, 4 channels: none of them"), "{text}");
    assert!(text.contains("conv.bias, 24 f32: left out: it has 1 dimension (24), so no channels"), "{text}");
    assert!(text.contains("steps, 12 x 2 i32: left out: it holds i32; expected f16"), "{text}");
    assert!(!fs::exists(&picture).unwrap());
    assert!(
        printed(&[&file, "--tensor", "conv.out", "--out", &picture]).unwrap().contains("4 channels, 6 values each")
    );
    assert!(fs::exists(&picture).unwrap());
    let refused = printed(&[&file, "--tensor", "conv"]).unwrap_err().to_string();
    let names = "has no tensor \"conv\"; it has: ";
    assert!(refused.contains(names) && tensors.iter().all(|tensor| refused.contains(tensor.0)), "{refused}");
    let refused = printed(&[&file, "--tensor", "conv.bias"]).unwrap_err().to_string();
    assert!(refused.contains("conv.bias: has 1 dimension"), "{refused}");
}

#[test]
fn mistakes_get_words() {
    let folder = Folder::new("mistakes");
    let data = bytes(Number::F32, &values(24));
    let whole = npy("'<f4'", false, &[2, 4, 3], &data);
    let files: [(&[u8], &[&str], &str); 14] = [
        (&whole, &["--layout", "nhwc"], "--layout nhwc is for 4 dimensions, the tensor has 3: 2 x 4 x 3"),
        (&whole, &["--layout", "nhw"], "expected one c"),
        (&whole, &["--layout", "ncc"], "expected one c"),
        (&whole[..whole.len() - 1], &[], "cut off"),
        (&npy("'<f4'", false, &[24], &data), &[], "has 1 dimension (24), so no channels"),
        (&npy("'<f4'", false, &[], &data), &[], "has 0 dimensions (one number), so no channels"),
        (&npy("'<f4'", false, &[3, 0, usize::MAX, 9], &data), &[], "is empty"),
        (&npy("'<i8'", false, &[2, 4, 3], &data), &[], "holds <i8; expected f16"),
        (&npy("'>f4'", false, &[2, 4, 3], &data), &[], "holds >f4 (the largest byte first); expected"),
        (&npy("[('a', '<f4'), ('b', '<f4')]", false, &[2, 4], &data), &[], "holds [[a,<f4],[b,<f4]]; expected"),
        (b"\x93NUMPY\x01\x00\x03\x00{a}", &[], "a header that numpy.save does not write: {a}"),
        (b"PK\x03\x04 and so on", &[], "numpy.savez and torch.save"),
        (b"mean,std\n0,1\n", &[], "neither .npy nor .safetensors"),
        (b"\x03\0\0\0\0\0\0\0{}  ", &[], "a file without tensors"),
    ];
    for (bytes, words, expected) in files {
        let file = folder.write("dump", bytes).display().to_string();
        let refused = printed(&[&[file.as_str()], words].concat()).unwrap_err().to_string();
        assert!(refused.contains(expected) && refused.starts_with(&file), "{refused}");
    }
    let missing = printed(&[&folder.0.join("missing.npy").display().to_string()]).unwrap_err().to_string();
    assert!(missing.contains("no such file") && missing.contains("--demo"), "{missing}");
    assert!(Args::try_parse_from(["inspect"]).is_err());
    let file = folder.write("dump.npy", &whole).display().to_string();
    let nowhere = folder.0.join("no/picture.svg").display().to_string();
    assert!(printed(&[&file, "--out", &nowhere]).unwrap_err().to_string().contains(&nowhere));
}
