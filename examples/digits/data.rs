//! Labelled images: the digits in this example, or MNIST in its IDX files.

use crate::Result;
use crate::network::CLASSES;
use rand::seq::SliceRandom;
use std::fs;
use std::io::Read;
use std::path::Path;

/// One image after the other, pixels scaled to `0..=1`.
pub struct Images {
    pub size: usize,
    pub pixels: Vec<f32>,
    pub labels: Vec<u8>,
}

impl Images {
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    pub fn image(&self, i: usize) -> &[f32] {
        &self.pixels[i * self.size..][..self.size]
    }

    fn select(&self, indices: &[usize]) -> Self {
        Images {
            size: self.size,
            pixels: indices.iter().flat_map(|&i| self.image(i)).copied().collect(),
            labels: indices.iter().map(|&i| self.labels[i]).collect(),
        }
    }
}

pub struct Data {
    pub name: String,
    pub height: usize,
    pub width: usize,
    pub train: Images,
    pub test: Images,
}

impl Data {
    /// The digits of `digits.csv`; four of five, drawn by `rng`, to train on.
    pub fn digits(rng: &mut impl rand::Rng) -> Result<Self> {
        const SIDE: usize = 8;
        let mut reader =
            csv::ReaderBuilder::new().has_headers(false).from_reader(include_str!("digits.csv").as_bytes());
        let mut all = Images { size: SIDE * SIDE, pixels: Vec::new(), labels: Vec::new() };
        for record in reader.deserialize() {
            let record: Vec<u8> = record?;
            match record.split_last() {
                Some((&label, pixels)) if pixels.len() == all.size && usize::from(label) < CLASSES => {
                    all.pixels.extend(pixels.iter().map(|&p| f32::from(p) / 16.0));
                    all.labels.push(label);
                }
                _ => return Err("digits.csv: a record is not 64 pixels and a digit".into()),
            }
        }
        let mut order: Vec<usize> = (0..all.len()).collect();
        order.shuffle(rng);
        let (train, test) = order.split_at(all.len() * 4 / 5);
        Ok(Data {
            name: "handwritten digits (UCI)".into(),
            height: SIDE,
            width: SIDE,
            train: all.select(train),
            test: all.select(test),
        })
    }

    /// The four files of MNIST, or of a data set in its format, from a folder.
    pub fn idx(folder: &Path) -> Result<Self> {
        if !folder.is_dir() {
            return Err(format!("{}: no such folder", folder.display()).into());
        }
        let (train, dims) = images(folder, "train")?;
        let (test, test_dims) = images(folder, "t10k")?;
        if dims != test_dims {
            let folder = folder.display();
            return Err(format!("{folder}: training images are {dims:?}, test images {test_dims:?}").into());
        }
        Ok(Data { name: folder.display().to_string(), height: dims[0], width: dims[1], train, test })
    }
}

/// Images and labels of one half of the data set, and the images' height and width.
fn images(folder: &Path, half: &str) -> Result<(Images, [usize; 2])> {
    let ([count, height, width], pixels) = idx_file(folder, half, "images")?;
    let ([label_count], labels) = idx_file(folder, half, "labels")?;
    let fail = |what: String| Err(format!("{}, {half}: {what}", folder.display()).into());
    if count != label_count {
        return fail(format!("{count} images but {label_count} labels"));
    }
    // The convolutional network halves each side twice.
    if count == 0 || height < 4 || width < 4 {
        return fail(format!("{count} images of {height} x {width}, too few or too small"));
    }
    if let Some(label) = labels.iter().find(|&&label| usize::from(label) >= CLASSES) {
        return fail(format!("a label is {label}, not one of {CLASSES} digits"));
    }
    let images =
        Images { size: height * width, pixels: pixels.iter().map(|&p| f32::from(p) / 255.0).collect(), labels };
    Ok((images, [height, width]))
}

/// Dimensions and bytes of an IDX file, which may be called in four ways.
fn idx_file<const N: usize>(folder: &Path, half: &str, what: &str) -> Result<([usize; N], Vec<u8>)> {
    let names = ["-", "."].map(|mark| format!("{half}-{what}{mark}idx{N}-ubyte"));
    let names = names.iter().flat_map(|name| [name.clone(), format!("{name}.gz")]);
    let paths: Vec<_> = names.map(|name| folder.join(name)).collect();
    let Some(path) = paths.iter().find(|path| path.exists()) else {
        let wanted = format!("{half}-{what}-idx{N}-ubyte[.gz]");
        return Err(format!("{}: no file {wanted} there", folder.display()).into());
    };
    let read = || -> Result<_> {
        let mut bytes = fs::read(path)?;
        // Told by the first bytes, since browsers like to unpack a file and leave its name.
        if bytes.starts_with(&[0x1f, 0x8b]) {
            let packed = std::mem::take(&mut bytes);
            flate2::read::MultiGzDecoder::new(packed.as_slice()).read_to_end(&mut bytes)?;
        }
        idx(&bytes)
    };
    read().map_err(|e| format!("{}: {e}", path.display()).into())
}

/// An IDX file of unsigned bytes with `N` dimensions: two zeros, type 8, `N`, then each dimension
/// as four bytes, highest first, then the data.
fn idx<const N: usize>(bytes: &[u8]) -> Result<([usize; N], Vec<u8>)> {
    let truncated = || format!("truncated after {} bytes", bytes.len());
    let (magic, mut rest) = bytes.split_first_chunk::<4>().ok_or_else(truncated)?;
    let expected = [0, 0, 8, N as u8];
    if *magic != expected {
        return Err(format!("wrong magic number {magic:02x?}, expected {expected:02x?}").into());
    }
    let mut dims = [0; N];
    for dim in &mut dims {
        let (number, after) = rest.split_first_chunk().ok_or_else(truncated)?;
        *dim = u32::from_be_bytes(*number).try_into()?;
        rest = after;
    }
    match dims.iter().try_fold(1_usize, |product, &d| product.checked_mul(d)) {
        Some(size) if size == rest.len() => Ok((dims, rest.to_vec())),
        _ => Err(format!("says {dims:?} but holds {} bytes of data", rest.len()).into()),
    }
}
