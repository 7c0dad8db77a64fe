//! What a slice means: the sizes of a tensor and the order of its elements.

use crate::error::{Error, Result};

/// Where the channel stands among the dimensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// `(batch, channels, spatial)`, the spatial values of one channel contiguous: NC, NCL, NCHW, NCDHW.
    ChannelsFirst,
    /// `(batch, spatial, channels)`, the channels of one position contiguous: NC, NLC, NHWC, NDHWC.
    ChannelsLast,
}

/// The sizes of a dense tensor and its layout; a slice for it holds [`Shape::len`] elements.
///
/// The constructors take their arguments in the order of the letters.
///
/// ```
/// use batchnorm::Shape;
/// let shape = Shape::nchw(32, 64, 56, 56)?;
/// assert_eq!(shape.channels(), 64);
/// assert_eq!(shape.count(), 32 * 56 * 56);
/// assert_eq!(shape.len(), 32 * 64 * 56 * 56);
/// # Ok::<(), batchnorm::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    layout: Layout,
    batch: usize,
    channels: usize,
    spatial: usize,
}

impl Shape {
    /// A shape from its layout, batch size, channels and spatial dimensions (any number of them; none for NC).
    ///
    /// # Errors
    /// [`Error::ZeroChannels`]; [`Error::ShapeOverflow`] if 8 bytes for each element do not fit `isize::MAX`.
    /// A batch or spatial size of zero is a valid, empty shape.
    pub fn new(layout: Layout, batch: usize, channels: usize, spatial: &[usize]) -> Result<Self> {
        if channels == 0 {
            return Err(Error::ZeroChannels);
        }
        let limit = isize::MAX as usize / size_of::<f64>();
        // Zeros are left out, so that an overflow of the other sizes shows for an empty shape too.
        let product =
            [batch, channels].iter().chain(spatial).filter(|&&d| d != 0).try_fold(1usize, |p, &d| p.checked_mul(d));
        match product {
            Some(len) if len <= limit => Ok(Self { layout, batch, channels, spatial: spatial.iter().product() }),
            _ => Err(Error::ShapeOverflow { dims: [&[batch, channels], spatial].concat() }),
        }
    }

    /// `(n, c)`: one value per sample and channel. Errors as [`Shape::new`].
    pub fn nc(n: usize, c: usize) -> Result<Self> {
        Self::new(Layout::ChannelsLast, n, c, &[])
    }

    /// `(n, c, l)`, `l` contiguous. Errors as [`Shape::new`].
    pub fn ncl(n: usize, c: usize, l: usize) -> Result<Self> {
        Self::new(Layout::ChannelsFirst, n, c, &[l])
    }

    /// `(n, c, h, w)`, `w` contiguous. Errors as [`Shape::new`].
    pub fn nchw(n: usize, c: usize, h: usize, w: usize) -> Result<Self> {
        Self::new(Layout::ChannelsFirst, n, c, &[h, w])
    }

    /// `(n, c, d, h, w)`, `w` contiguous. Errors as [`Shape::new`].
    pub fn ncdhw(n: usize, c: usize, d: usize, h: usize, w: usize) -> Result<Self> {
        Self::new(Layout::ChannelsFirst, n, c, &[d, h, w])
    }

    /// `(n, l, c)`, `c` contiguous. Errors as [`Shape::new`].
    pub fn nlc(n: usize, l: usize, c: usize) -> Result<Self> {
        Self::new(Layout::ChannelsLast, n, c, &[l])
    }

    /// `(n, h, w, c)`, `c` contiguous ("channels last"). Errors as [`Shape::new`].
    pub fn nhwc(n: usize, h: usize, w: usize, c: usize) -> Result<Self> {
        Self::new(Layout::ChannelsLast, n, c, &[h, w])
    }

    /// `(n, d, h, w, c)`, `c` contiguous. Errors as [`Shape::new`].
    pub fn ndhwc(n: usize, d: usize, h: usize, w: usize, c: usize) -> Result<Self> {
        Self::new(Layout::ChannelsLast, n, c, &[d, h, w])
    }

    /// The same with another number of samples, at most as many.
    pub(crate) fn with_batch(&self, batch: usize) -> Self {
        Self { batch, ..*self }
    }

    /// Where the channel stands.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The number of samples, N.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// The number of channels, C; at least one.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// The number of values per sample and channel, S: the product of the spatial sizes, 1 for NC.
    pub fn spatial(&self) -> usize {
        self.spatial
    }

    /// The number of values per channel, N * S.
    pub fn count(&self) -> usize {
        self.batch * self.spatial
    }

    /// The number of elements of a slice of this shape, N * C * S.
    pub fn len(&self) -> usize {
        self.count() * self.channels
    }

    /// Whether the shape holds no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
