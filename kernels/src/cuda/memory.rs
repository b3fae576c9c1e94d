//! Memory of a device, owned: numbers, rows of bf16 and weights.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::driver::Driver;
use super::eights::Eights;
use super::error::GpuError;
use super::launch::{CELL, Plain, SCALED_K, bytes_of};
use crate::F8Matrix;

/// K in memory is a multiple of this, so that tiles and 16-byte copies never straddle a row's end.
pub(crate) const DEPTH_UNIT: usize = 64;

/// One allocation, freed on drop.
pub(crate) struct Memory {
    driver: Arc<dyn Driver>,
    at: u64,
    bytes: usize,
}

impl Memory {
    pub(crate) fn new(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Memory, GpuError> {
        Ok(Memory { driver: driver.clone(), at: driver.allocate(bytes)?, bytes })
    }

    pub(crate) fn zeroed(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Memory, GpuError> {
        let memory = Memory::new(driver, bytes)?;
        // SAFETY: the whole allocation.
        unsafe { driver.fill(memory.at, 0, bytes)? };
        Ok(memory)
    }

    /// Zeroed, and for others to read where the device has such memory.
    pub(crate) fn shared(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Memory, GpuError> {
        let memory = Memory { driver: driver.clone(), at: driver.allocate_shared(bytes)?, bytes };
        // SAFETY: the whole allocation.
        unsafe { driver.fill(memory.at, 0, bytes)? };
        Ok(memory)
    }

    /// Another process's memory of at least so many bytes, for reading.
    pub(crate) fn of_another(driver: &Arc<dyn Driver>, descriptor: OwnedFd, least: usize) -> Result<Memory, GpuError> {
        Ok(Memory { driver: driver.clone(), at: driver.import(descriptor, least)?, bytes: least })
    }

    pub(crate) fn export(&self) -> Result<OwnedFd, GpuError> {
        self.driver.export(self.at)
    }

    pub(crate) fn of<T: Plain>(driver: &Arc<dyn Driver>, values: &[T]) -> Result<Memory, GpuError> {
        let memory = Memory::new(driver, size_of_val(values))?;
        memory.write(0, values)?;
        Ok(memory)
    }

    pub(crate) fn at(&self) -> u64 {
        self.at
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Makes room for `bytes`; the content is lost when it must grow.
    pub(crate) fn ensure(&mut self, bytes: usize) -> Result<(), GpuError> {
        if self.bytes < bytes {
            *self = Memory::new(&self.driver.clone(), bytes.next_power_of_two())?;
        }
        Ok(())
    }

    /// Writes values from byte `offset` on.
    pub(crate) fn write<T: Plain>(&self, offset: usize, values: &[T]) -> Result<(), GpuError> {
        assert!(offset + size_of_val(values) <= self.bytes, "values past the end of their memory");
        // SAFETY: inside the allocation.
        unsafe { self.driver.upload(self.at + offset as u64, bytes_of(values)) }
    }

    pub(crate) fn read<T: Plain + Default>(&self, offset: usize, count: usize) -> Result<Vec<T>, GpuError> {
        let mut values = vec![T::default(); count];
        let bytes = count * size_of::<T>();
        assert!(offset + bytes <= self.bytes, "values past the end of their memory");
        // SAFETY: plain values take any bytes; inside the allocation.
        unsafe {
            let to = std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), bytes);
            self.driver.download(self.at + offset as u64, to)?;
        }
        Ok(values)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: ours; what was launched over it is done before it is freed.
        unsafe { self.driver.free(self.at) }
    }
}

/// f32 values.
pub struct Floats {
    pub(crate) memory: Memory,
    len: usize,
}

impl Floats {
    pub(crate) fn new(driver: &Arc<dyn Driver>, len: usize) -> Result<Floats, GpuError> {
        Ok(Floats { memory: Memory::new(driver, len * 4)?, len })
    }

    pub(crate) fn of(driver: &Arc<dyn Driver>, values: &[f32]) -> Result<Floats, GpuError> {
        Ok(Floats { memory: Memory::of(driver, values)?, len: values.len() })
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Makes room for `len` values; the content is lost when it must grow.
    pub fn ensure(&mut self, len: usize) -> Result<(), GpuError> {
        self.memory.ensure(len * 4)?;
        self.len = self.len.max(len);
        Ok(())
    }

    /// The first `count` values.
    pub fn read(&self, count: usize) -> Result<Vec<f32>, GpuError> {
        self.memory.read(0, count)
    }

    /// Where they lie.
    pub fn place(&self) -> u64 {
        self.at()
    }

    pub(crate) fn at(&self) -> u64 {
        self.memory.at()
    }
}

/// Rows of bf16 that matmuls read: zeros behind each row's end.
pub struct Rows {
    pub(crate) memory: Memory,
    driver: Arc<dyn Driver>,
    rows: usize,
    width: usize,
    stride: usize,
}

impl Rows {
    pub(crate) fn new(driver: &Arc<dyn Driver>, rows: usize, width: usize) -> Result<Rows, GpuError> {
        let stride = width.next_multiple_of(DEPTH_UNIT);
        Ok(Rows { memory: Memory::zeroed(driver, rows * stride * 2)?, driver: driver.clone(), rows, width, stride })
    }

    pub fn width(&self) -> usize {
        self.width
    }

    /// Makes room for `rows` rows; the content is lost when it must grow.
    pub fn ensure(&mut self, rows: usize) -> Result<(), GpuError> {
        if self.rows < rows {
            *self = Rows::new(&self.driver.clone(), rows.next_power_of_two(), self.width)?;
        }
        Ok(())
    }

    /// Writes rows of bf16 from the first on.
    pub fn write(&self, values: &[u16]) -> Result<(), GpuError> {
        for (row, values) in values.chunks(self.width).enumerate() {
            self.memory.write(row * self.stride * 2, values)?;
        }
        Ok(())
    }

    /// The first `rows` rows without what lies behind their ends.
    pub fn read(&self, rows: usize) -> Result<Vec<u16>, GpuError> {
        let all: Vec<u16> = self.memory.read(0, rows * self.stride)?;
        Ok(all.chunks(self.stride).flat_map(|row| row[..self.width].to_vec()).collect())
    }

    pub(crate) fn at(&self) -> u64 {
        self.memory.at()
    }

    /// Where they lie.
    pub fn place(&self) -> u64 {
        self.at()
    }

    pub(crate) fn stride(&self) -> u32 {
        self.stride as u32
    }

    pub(crate) fn check(&self, rows: usize, width: usize) {
        assert!(rows <= self.rows && width == self.width, "rows do not fit ({rows}, {width})");
    }
}

/// A weight matrix (outputs, K): in bf16 row by row, zeros behind each row's end, or in 8 bits.
pub struct GpuMatrix {
    pub(crate) memory: Memory,
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    pub(crate) depth: usize,
    /// What the memory's cells of 8 bits mean.
    pub(crate) eights: Option<Eights>,
}

impl GpuMatrix {
    /// Whether the parts of a matrix can be kept in 8 bits together: scaled alike, in pieces that the kernels know.
    pub fn keeps(parts: &[F8Matrix]) -> bool {
        let several = parts.iter().any(|part| part.block.1 < part.cols);
        parts.iter().all(|part| part.fits() && (!several || part.whole(CELL.0, SCALED_K)))
    }

    pub fn outputs(&self) -> usize {
        self.outputs
    }

    pub fn inputs(&self) -> usize {
        self.inputs
    }

    pub fn bytes(&self) -> usize {
        self.memory.bytes() + self.eights.as_ref().map_or(0, |eights| eights.scales.memory.bytes())
    }
}
