//! What links are compared with: libc's memcpy on one core, and a plain blocking socket over loopback.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};

use tokio::time::Instant;

pub(super) struct Plain {
    near: TcpStream,
    far: TcpStream,
    source: Vec<u8>,
    target: Vec<u8>,
    /// Bytes of one copy, one write and one read.
    piece: usize,
}

impl Plain {
    #[allow(clippy::disallowed_methods)] // A socket without core::Net is what is measured.
    pub(super) fn new(piece: usize, bytes: usize) -> io::Result<Plain> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let near = TcpStream::connect(listener.local_addr()?)?;
        let (far, _) = listener.accept()?;
        near.set_nodelay(true)?;
        far.set_nodelay(true)?;
        Ok(Plain { near, far, source: vec![1; bytes], target: vec![2; bytes], piece })
    }

    /// Seconds of copying everything so many times.
    pub(super) fn copy(&mut self, passes: usize) -> f64 {
        let started = Instant::now();
        for _ in 0..passes {
            for (to, from) in self.target.chunks_mut(self.piece).zip(self.source.chunks(self.piece)) {
                to.copy_from_slice(from);
            }
            std::hint::black_box(&mut self.target);
        }
        started.elapsed().as_secs_f64()
    }

    /// Seconds of sending everything so many times, one thread at each end.
    pub(super) fn send(&mut self, passes: usize) -> io::Result<f64> {
        let Plain { near, far, source, target, piece } = self;
        let started = Instant::now();
        std::thread::scope(|scope| {
            let reading = scope.spawn(|| -> io::Result<()> {
                for _ in 0..passes {
                    for part in target.chunks_mut(*piece) {
                        far.read_exact(part)?;
                    }
                    far.write_all(&[1])?;
                }
                Ok(())
            });
            for _ in 0..passes {
                for part in source.chunks(*piece) {
                    near.write_all(part)?;
                }
                near.read_exact(&mut [0])?;
            }
            reading.join().expect("the reader does not panic")
        })?;
        Ok(started.elapsed().as_secs_f64())
    }
}
