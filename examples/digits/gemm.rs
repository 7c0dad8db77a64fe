//! The one door to `matrixmultiply::sgemm`: matrices are slices whose sizes are checked.

/// A matrix over a slice, row by row, or the transpose of one.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: isize,
    col_stride: isize,
}

impl<'a> Matrix<'a> {
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(Some(data.len()), rows.checked_mul(cols), "matrix size");
        Matrix { data, rows, cols, row_stride: cols as isize, col_stride: 1 }
    }

    pub fn transposed(self) -> Self {
        Matrix {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }
}

/// `c = alpha a b + beta c`, with `c` row by row; a `beta` of zero overwrites `c` whatever it holds.
pub fn gemm(alpha: f32, a: Matrix, b: Matrix, beta: f32, c: &mut [f32]) {
    assert_eq!(a.cols, b.rows, "inner sizes");
    assert_eq!(Some(c.len()), a.rows.checked_mul(b.cols), "result size");
    // SAFETY: `Matrix::new` made sure that `rows` times `cols` is the length of `data`, and the
    // strides are those of that layout or its transpose, so every element read of `a` and `b` is
    // inside its slice. `c` has rows x cols elements, distinct under strides (cols, 1), and is
    // borrowed mutably, so it overlaps neither.
    unsafe {
        matrixmultiply::sgemm(
            a.rows,
            a.cols,
            b.cols,
            alpha,
            a.data.as_ptr(),
            a.row_stride,
            a.col_stride,
            b.data.as_ptr(),
            b.row_stride,
            b.col_stride,
            beta,
            c.as_mut_ptr(),
            b.cols as isize,
            1,
        );
    }
}
