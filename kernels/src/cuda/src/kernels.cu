// All kernels as one source for nvcc; at start the same files are compiled together by NVRTC (compile.rs).
#include "attention.cu"
#include "blocks.cu"
#include "matmul.cu"
#include "matmul_f8.cu"
#include "matmul_hopper.cu"
#include "matmul_f8_hopper.cu"
#include "rows.cu"
#include "sampling.cu"
