//! Speeds of the kernels in the shapes of Qwen2.5-0.5B, as shares of the limits measured in between.
//!
//! `cargo run --release -p baton-kernels --example speed [threads] [f32acc|bf16dp|best] [matmul|attention|rows] [q8_0|q4_0]`

use baton_core::{Arena, BlockLayout, KvDtype};
use baton_kernels::limits::{best, byte_operations, matmul_flops, read_bandwidth};
use baton_kernels::{
    Attention, Cpu, Dtype, Heads, KvHeads, Matrix, Packed, Profile, Quantize, RopeStore, RopeTable, Span,
};

const HEADS: Heads = Heads { heads: 14, kv_heads: 2, head_dim: 64 };
const HIDDEN: usize = 896;
const INNER: usize = 4864;
const VOCABULARY: usize = 151_936;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let threads = arguments.get(1).and_then(|text| text.parse().ok()).unwrap_or(2);
    let profile = match arguments.get(2).map(String::as_str) {
        Some("f32acc") => Profile::F32Acc,
        Some("bf16dp") => Profile::Bf16Dp,
        _ => Profile::best(),
    };
    let wanted = |part: &str| arguments.get(3).is_none_or(|text| text == part);
    let cpu = Cpu::new(threads, profile).expect("this machine runs the profile");
    println!("{} {profile} on {threads} threads", cpu.isa());
    if wanted("matmul") {
        let named = |quantize: &Quantize| arguments.get(4).is_some_and(|name| name == quantize.as_str());
        matmuls(&cpu, Quantize::ALL.into_iter().find(named));
    }
    if wanted("attention") {
        attention(&cpu);
    }
    if wanted("rows") {
        rows(&cpu);
    }
}

fn matmuls(cpu: &Cpu, quantize: Option<Quantize>) {
    let weights = |rows, cols| weights(cpu, rows, cols, quantize);
    let (qkv, gate_up) = (weights(HEADS.qkv_width(), HIDDEN), weights(2 * INNER, HIDDEN));
    let (down, head) = (weights(HIDDEN, INNER), weights(VOCABULARY, HIDDEN));
    for rows in [1, 2, 4, 8, 16, 32] {
        matmul(cpu, "head", &head, rows, false);
    }
    for rows in [128, 512, 2048] {
        matmul(cpu, "qkv", &qkv, rows, false);
        matmul(cpu, "gate_up", &gate_up, rows, false);
        matmul(cpu, "down", &down, rows, true);
    }
    // What the segments of K cost, beside the same matrix as one chain.
    for rows in [1, 8, 32, 512] {
        matmul(cpu, "down in one chain", &down, rows, false);
        matmul(cpu, "down in segments", &down, rows, true);
    }
}

fn weights(cpu: &Cpu, rows: usize, cols: usize, quantize: Option<Quantize>) -> Packed {
    let bytes: Vec<u8> = (0..rows * cols).flat_map(|i| (0x3c00 + (i % 251) as u16).to_le_bytes()).collect();
    let mut packed = None;
    let matrix = Matrix { dtype: Dtype::Bf16, bytes: &bytes, rows, cols };
    let seconds = best(1, || packed = Some(cpu.pack_as(&[matrix], quantize)));
    println!("pack {rows}x{cols}: {:.2} GB/s", bytes.len() as f64 / seconds / 1e9);
    packed.expect("packed once")
}

fn matmul(cpu: &Cpu, name: &str, w: &Packed, rows: usize, segmented: bool) {
    let x: Vec<f32> = (0..rows * w.cols()).map(|i| (i % 17) as f32 * 0.1).collect();
    let mut y = vec![0.0; rows * w.rows()];
    let (mut bandwidth, mut flops, mut seconds) = (0.0f64, 0.0f64, f64::INFINITY);
    for _ in 0..3 {
        bandwidth = bandwidth.max(read_bandwidth(cpu.threads(), 2));
        flops = flops.max(match w.is_quantized() {
            true => byte_operations(cpu.threads(), 10),
            false => matmul_flops(cpu.threads(), cpu.profile(), 10),
        });
        let run = || match segmented {
            true => cpu.matmul_segmented(&x, rows, w, &mut y),
            false => cpu.matmul(&x, rows, w, &mut y),
        };
        seconds = seconds.min(best(5, run));
    }
    let (bytes, work) = (w.bytes() as f64 / 1e9, 2.0 * (rows * w.rows() * w.cols()) as f64 / 1e9);
    let limit = (bytes / bandwidth).max(work / flops);
    println!(
        "{name} rows {rows}: {:.1} GB/s of {bandwidth:.1}, {:.0} GFLOP/s of {flops:.0}: {:.0} % of the limit",
        bytes / seconds,
        work / seconds,
        100.0 * limit / seconds
    );
}

/// Over every KV dtype in turn, with how much faster than bf16 each is.
fn attention(cpu: &Cpu) {
    let positions = 8192;
    let (kv_heads, head_dim) = (HEADS.kv_heads as u32, HEADS.head_dim as u32);
    let sequences = 32;
    let caches = [KvDtype::Bf16, KvDtype::F32, KvDtype::Int8, KvDtype::Fp8].map(|dtype| {
        let layout = BlockLayout { layers: 1, kv_heads, head_dim, block_tokens: 16, dtype };
        let mut arena = Arena::new(layout, sequences * positions / 16);
        // Memory that was never written is one page of zeros, over and over.
        arena.bytes_mut().fill(0x3c);
        arena
    });
    let tables: Vec<Vec<u32>> =
        (0..sequences).map(|s| (0..positions / 16).map(|i| (i * sequences + s) as u32).collect()).collect();
    let bandwidth = read_bandwidth(cpu.threads(), 3);
    let flops = matmul_flops(cpu.threads(), cpu.profile(), 10);
    for rows in [128, 512, 2048] {
        let spans = [Span { row: 0, rows, position: 0, blocks: &tables[0] }];
        let mut first = None;
        for arena in &caches {
            let (dtype, seconds) = (arena.layout().dtype.as_str(), attend(cpu, arena, &spans, rows));
            let work = 2.0 * (rows * rows * HEADS.width()) as f64 / 1e9;
            println!(
                "prefill attention {rows}, {dtype}: {:.0} µs, {:.0} GFLOP/s of {flops:.0} (causal half counted), {:.2} x",
                seconds * 1e6,
                work / seconds,
                *first.get_or_insert(seconds) / seconds
            );
        }
    }
    for (batch, length) in [(1, 8192), (8, 2048), (8, 8192), (32, 2048), (32, 8192)] {
        let spans: Vec<Span> =
            (0..batch).map(|s| Span { row: s, rows: 1, position: length - 1, blocks: &tables[s] }).collect();
        let mut first = None;
        for arena in &caches {
            let (layout, seconds) = (arena.layout(), attend(cpu, arena, &spans, batch));
            let bytes = (batch * length * layout.layer_bytes() / 16) as f64 / 1e9;
            println!(
                "decode attention batch {batch}, {length} positions, {}: {:.0} µs, {:.1} GB/s of {bandwidth:.1}, {:.2} x",
                layout.dtype.as_str(),
                seconds * 1e6,
                bytes / seconds,
                *first.get_or_insert(seconds) / seconds
            );
        }
    }
}

fn attend(cpu: &Cpu, arena: &Arena, spans: &[Span], rows: usize) -> f64 {
    let qkv: Vec<f32> = (0..rows * HEADS.qkv_width()).map(|i| (i % 13) as f32 * 0.125 - 0.75).collect();
    let mut out = vec![0.0; rows * HEADS.width()];
    let a = Attention { heads: HEADS, kv: KvHeads::default(), layer: 0, spans, scale: 0.125, window: None };
    best(10, || cpu.attention(&a, &qkv, arena, &mut out))
}

fn rows(cpu: &Cpu) {
    let layout = BlockLayout { layers: 1, kv_heads: 2, head_dim: 64, block_tokens: 16, dtype: KvDtype::Bf16 };
    let arena = Arena::new(layout, 32);
    let blocks: Vec<u32> = (0..32).collect();
    let inv_freq: Vec<f64> = (0..32).map(|i| 1.0 / (i + 1) as f64).collect();
    let mut table = None;
    let seconds = best(1, || table = Some(RopeTable::new(&inv_freq, 32_768)));
    println!("rotation table of 32768 positions: {:.1} ms", seconds * 1e3);
    let rope = table.expect("made once");
    for rows in [1, 512] {
        let numbers = |count: usize| (0..count).map(|i| (i % 19) as f32 * 0.1 - 0.9).collect::<Vec<f32>>();
        let (mut x, delta, weight) = (numbers(rows * HIDDEN), numbers(rows * HIDDEN), numbers(HIDDEN));
        let mut out = x.clone();
        let seconds = best(20, || cpu.add_rms_norm(&mut x, &delta, &weight, 1e-6, &mut out));
        println!("add_rms_norm rows {rows}: {:.1} µs", seconds * 1e6);
        let (gate_up, mut inner) = (numbers(rows * 2 * INNER), numbers(rows * INNER));
        let seconds = best(20, || cpu.silu_mul(&gate_up, INNER, &mut inner));
        println!("silu_mul rows {rows}: {:.1} µs", seconds * 1e6);
        let mut qkv = numbers(rows * HEADS.qkv_width());
        let spans = [Span { row: 0, rows, position: 0, blocks: &blocks }];
        let (heads, kv, spans) = (HEADS, KvHeads::default(), &spans);
        let store = RopeStore { heads, kv, layer: 0, spans, rope: &rope, q_norm: None, k_norm: None, eps: 0.0 };
        let seconds = best(20, || cpu.rope_store(&store, &mut qkv, &arena));
        println!("rope_store rows {rows}: {:.1} µs", seconds * 1e6);
    }
    let logits: Vec<f32> = (0..VOCABULARY).map(|i| (i % 1013) as f32 * 0.01).collect();
    println!("argmax: {:.1} µs", best(20, || _ = std::hint::black_box(cpu.argmax(&logits))) * 1e6);
    println!("log_sum_exp: {:.1} µs", best(20, || _ = std::hint::black_box(cpu.log_sum_exp(&logits))) * 1e6);
}
