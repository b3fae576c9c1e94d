//! Compiles the GPU's kernels ahead of time: `cubins FOLDER ARCH...`, with ARCH as `sm_90a`. A worker whose machine has no
//! NVRTC loads them from there (BATON_CUBINS). Needs NVRTC and no GPU.

use baton_kernels::cuda::Cubins;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().ok_or("usage: cubins FOLDER ARCH...")?;
    for arch in arguments {
        println!("{}", Cubins::new(&folder).make(&arch)?.display());
    }
    Ok(())
}
