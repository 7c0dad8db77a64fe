//! Files of tensors: what is in them and where, read without loading them.

use crate::Result;
use safetensors::tensor::{Dtype, Metadata};
use serde::Deserialize;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;

/// A file, and the tensors in it.
pub struct Dump {
    file: File,
    pub tensors: Vec<Tensor>,
}

/// Where a tensor lies in its file.
pub struct Tensor {
    pub name: String,
    pub sizes: Vec<usize>,
    /// Whether the first dimension is contiguous, not the last.
    pub fortran: bool,
    /// Or the name of a type that is not read.
    pub number: std::result::Result<Number, String>,
    offset: u64,
}

/// The types that are read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Number {
    F16,
    Bf16,
    F32,
    F64,
}

impl Number {
    pub fn bytes(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }
}

/// A tensor as `(outer, channels, inner)`, the last contiguous: which any layout comes to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Extent {
    pub outer: usize,
    pub channels: usize,
    pub inner: usize,
    /// Which dimension of the tensor the channels are.
    pub axis: usize,
}

impl Extent {
    /// Where the channels were looked for, and how to say otherwise.
    pub fn told(&self, tensor: &Tensor) -> String {
        let (at, count) = (self.axis + 1, tensor.sizes.len());
        let last = match count {
            3 => "nlc, or chw for one sample,",
            4 => "nhwc",
            5 => "ndhwc",
            _ => "with a letter for each dimension",
        };
        match at == count {
            true => "The channels are the last dimension.".into(),
            false => format!("The channels are dimension {at} of {count}: --layout {last} if they are another."),
        }
    }
}

impl Dump {
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path).map_err(|e| match e.kind() {
            ErrorKind::NotFound => "there is no such file; --demo makes one to try".to_string(),
            _ => e.to_string(),
        })?;
        let length = file.metadata()?.len();
        let mut begin = Vec::new();
        file.by_ref().take(10).read_to_end(&mut begin)?;
        let tensors = match begin[..] {
            [0x93, b'N', b'U', b'M', b'P', b'Y', major, _, a, b] => vec![npy(&mut file, major, [a, b])?],
            [b'P', b'K', ..] => {
                return Err("a zip archive, as numpy.savez and torch.save write them; \
                            expected a file of numpy.save (.npy) or safetensors.torch.save_file (.safetensors)"
                    .into());
            }
            [a, b, c, d, e, f, g, h, b'{', _] => safetensors(&mut file, u64::from_le_bytes([a, b, c, d, e, f, g, h]))?,
            _ => return Err("neither .npy nor .safetensors".into()),
        };
        for tensor in &tensors {
            if tensor.offset.saturating_add(tensor.bytes()) > length {
                return Err(format!("cut off: {} ends beyond the end of the file", tensor.title()).into());
            }
        }
        if tensors.is_empty() {
            return Err("a file without tensors".into());
        }
        Ok(Self { file, tensors })
    }

    /// The bytes of a tensor, from the first to the last.
    pub fn bytes_of(&self, tensor: &Tensor) -> Result<impl Read> {
        let mut file = &self.file;
        file.seek(SeekFrom::Start(tensor.offset))?;
        Ok(file.take(tensor.bytes()))
    }
}

impl Tensor {
    pub fn bytes(&self) -> u64 {
        let each = self.number.as_ref().map_or(0, |number| number.bytes());
        self.sizes.iter().fold(each as u64, |bytes, &size| bytes.saturating_mul(size as u64))
    }

    /// Its name, sizes and type.
    pub fn title(&self) -> String {
        let number = match &self.number {
            Ok(number) => format!("{number:?}").to_lowercase(),
            Err(name) => name.clone(),
        };
        format!("{}, {} {number}{}", self.name, self.shape(), if self.fortran { ", Fortran order" } else { "" })
    }

    pub fn shape(&self) -> String {
        match &self.sizes[..] {
            [] => "one number".into(),
            sizes => sizes.iter().map(usize::to_string).collect::<Vec<_>>().join(" x "),
        }
    }

    /// What the layout, or its default, makes of the sizes.
    pub fn extent(&self, layout: Option<&str>) -> Result<Extent> {
        let (sizes, count) = (&self.sizes, self.sizes.len());
        if let Err(name) = &self.number {
            return Err(format!(
                "holds {name}; expected f16, bf16, f32 or f64, lowest byte first: save x.astype(\"<f4\")"
            )
            .into());
        }
        if count < 2 {
            return Err(format!(
                "has {count} dimension{} ({}), so no channels: expected a batch with channels, such as N x C or \
                 N x C x H x W",
                if count == 1 { "" } else { "s" },
                self.shape()
            )
            .into());
        }
        let layout = layout.map(str::to_lowercase);
        let axis = match &layout {
            None => 1,
            Some(letters) => {
                let axis = letters.find('c').filter(|_| letters.matches('c').count() == 1);
                let axis = axis.ok_or(format!("--layout {letters}: expected one c, for the channels, such as nchw"))?;
                if letters.chars().count() != count {
                    return Err(format!(
                        "--layout {letters} is for {} dimensions, the tensor has {count}: {}",
                        letters.chars().count(),
                        self.shape()
                    )
                    .into());
                }
                letters[..axis].chars().count()
            }
        };
        if self.bytes() == 0 {
            return Err(format!("is empty: {}", self.shape()).into());
        }
        let product = |sizes: &[usize]| sizes.iter().product();
        let (before, after) = (product(&sizes[..axis]), product(&sizes[axis + 1..]));
        let (outer, inner) = if self.fortran { (after, before) } else { (before, after) };
        Ok(Extent { outer, channels: sizes[axis], inner, axis })
    }
}

/// The header that numpy.save writes, a literal of Python: `{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }`.
#[derive(Deserialize)]
struct Header {
    descr: serde_json::Value,
    fortran_order: bool,
    shape: Vec<usize>,
}

/// <https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>
fn npy(file: &mut File, major: u8, length: [u8; 2]) -> Result<Tensor> {
    let length = match major {
        1 => u16::from_le_bytes(length).into(),
        _ => {
            let mut rest = [0; 2];
            file.read_exact(&mut rest)?;
            u32::from_le_bytes([length[0], length[1], rest[0], rest[1]])
        }
    };
    let mut header = String::new();
    file.take(length.into()).read_to_string(&mut header).map_err(|_| "the header is not text")?;
    // The literals that numpy.save writes differ from JSON in these.
    let mut json = header.trim().to_string();
    for (python, other) in [("'", "\""), ("(", "["), (")", "]"), ("False", "false"), ("True", "true")] {
        json = json.replace(python, other);
    }
    json = json.split(',').map(str::trim).collect::<Vec<_>>().join(",").replace(",]", "]").replace(",}", "}");
    let header: Header = serde_json::from_str(&json)
        .map_err(|_| format!("a header that numpy.save does not write: {}", header.trim()))?;
    let number = match header.descr.as_str() {
        Some("<f2") => Ok(Number::F16),
        Some("<f4") => Ok(Number::F32),
        Some("<f8") => Ok(Number::F64),
        Some(big) if big.starts_with(">f") => Err(format!("{big} (the largest byte first)")),
        _ => Err(header.descr.to_string().replace('"', "")),
    };
    let offset = file.stream_position()?;
    Ok(Tensor { name: "array".into(), sizes: header.shape, fortran: header.fortran_order, number, offset })
}

fn safetensors(file: &mut File, length: u64) -> Result<Vec<Tensor>> {
    // The format's own bound.
    if length > 100_000_000 {
        return Err("neither .npy nor .safetensors".into());
    }
    let mut header = Vec::new();
    file.seek(SeekFrom::Start(8))?;
    file.take(length).read_to_end(&mut header)?;
    let metadata: Metadata =
        serde_json::from_slice(&header).map_err(|e| format!("not a header of .safetensors: {e}"))?;
    let tensors = metadata.offset_keys().into_iter().filter_map(|name| {
        let info = metadata.info(&name)?;
        let number = match info.dtype {
            Dtype::F16 => Ok(Number::F16),
            Dtype::BF16 => Ok(Number::Bf16),
            Dtype::F32 => Ok(Number::F32),
            Dtype::F64 => Ok(Number::F64),
            other => Err(format!("{other:?}").to_lowercase()),
        };
        let offset = 8 + length + info.data_offsets.0 as u64;
        Some(Tensor { name, sizes: info.shape.clone(), fortran: false, number, offset })
    });
    Ok(tensors.collect())
}
