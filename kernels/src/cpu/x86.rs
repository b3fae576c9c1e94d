//! Lanes in AVX-512 and AVX2 registers, and the entry points compiled for them.

use std::arch::x86_64::*;

use super::lanes::{Kernel, Lanes};

pub(crate) struct Avx512;
pub(crate) struct Avx512Vnni;
pub(crate) struct Avx512Bf16;
pub(crate) struct Avx2;

/// # Safety
/// The machine has AVX-512 F, BW, DQ, VL, VNNI and BF16; the kernel's pointers are valid.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,bmi2,f16c")]
pub(crate) unsafe fn launch_avx512bf16<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's.
    unsafe { kernel.run::<Avx512Bf16>() }
}

/// # Safety
/// The machine has AVX-512 F, BW, DQ, VL and VNNI; the kernel's pointers are valid.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,bmi2,f16c")]
pub(crate) unsafe fn launch_avx512vnni<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's.
    unsafe { kernel.run::<Avx512Vnni>() }
}

/// # Safety
/// The machine has AVX-512 F, BW, DQ and VL; the kernel's pointers are valid.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2,f16c")]
pub(crate) unsafe fn launch_avx512<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's.
    unsafe { kernel.run::<Avx512>() }
}

/// # Safety
/// The machine has AVX2, FMA and F16C; the kernel's pointers are valid.
#[target_feature(enable = "avx2,fma,bmi2,f16c")]
pub(crate) unsafe fn launch_avx2<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's.
    unsafe { kernel.run::<Avx2>() }
}

/// Halves of distance 4, 2, 1 of `reference::tree`, by any lane operation.
macro_rules! fold_256 {
    ($x:expr, $op256:ident, $op128:ident, $op1:ident) => {{
        let x: __m256 = $x;
        let x = $op128(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = $op128(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32($op1(x, _mm_shuffle_ps::<1>(x, x)))
    }};
}

macro_rules! avx512_lanes {
    ($name:ident, $dot:expr, $dot_bytes:expr) => {
        // SAFETY (of each block): the trait's contract.
        impl Lanes for $name {
            type F = __m512;
            type I = __m512i;
            const WIDE: bool = true;

            #[inline(always)]
            unsafe fn splat(x: f32) -> __m512 {
                unsafe { _mm512_set1_ps(x) }
            }
            #[inline(always)]
            unsafe fn load(from: *const f32) -> __m512 {
                unsafe { _mm512_loadu_ps(from) }
            }
            #[inline(always)]
            unsafe fn store(to: *mut f32, x: __m512) {
                unsafe { _mm512_storeu_ps(to, x) }
            }
            #[inline(always)]
            unsafe fn add(a: __m512, b: __m512) -> __m512 {
                unsafe { _mm512_add_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn sub(a: __m512, b: __m512) -> __m512 {
                unsafe { _mm512_sub_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn mul(a: __m512, b: __m512) -> __m512 {
                unsafe { _mm512_mul_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn div(a: __m512, b: __m512) -> __m512 {
                unsafe { _mm512_div_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
                unsafe { _mm512_fmadd_ps(a, b, c) }
            }
            #[inline(always)]
            unsafe fn larger(a: __m512, b: __m512) -> __m512 {
                unsafe { _mm512_max_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn smaller(a: __m512, b: __m512) -> __m512 {
                unsafe { _mm512_min_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn select_less(a: __m512, b: __m512, then: __m512, otherwise: __m512) -> __m512 {
                unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), otherwise, then) }
            }
            #[inline(always)]
            unsafe fn power_of_two(t: __m512) -> __m512 {
                unsafe {
                    let n = _mm512_slli_epi32::<23>(_mm512_castps_si512(t));
                    _mm512_castsi512_ps(_mm512_add_epi32(n, _mm512_set1_epi32(0x3f80_0000)))
                }
            }
            #[inline(always)]
            unsafe fn negate(x: __m512) -> __m512 {
                unsafe { _mm512_xor_ps(x, _mm512_set1_ps(-0.0)) }
            }
            #[inline(always)]
            unsafe fn round_bf16(x: __m512) -> __m512 {
                unsafe {
                    let bits = _mm512_castps_si512(x);
                    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                    let up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
                    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
                    let up = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x40_0000));
                    _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(0xffff_0000u32 as i32)))
                }
            }
            #[inline(always)]
            unsafe fn store_bf16(to: *mut u16, x: __m512) {
                unsafe {
                    let narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(_mm512_castps_si512(x)));
                    _mm256_storeu_si256(to.cast(), narrow)
                }
            }
            #[inline(always)]
            unsafe fn load_bf16(from: *const u16) -> __m512 {
                unsafe {
                    let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
                }
            }
            #[inline(always)]
            unsafe fn load_even(from: *const u8) -> __m512 {
                unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_loadu_si512(from.cast()))) }
            }
            #[inline(always)]
            unsafe fn load_odd(from: *const u8) -> __m512 {
                unsafe {
                    let high = _mm512_set1_epi32(0xffff_0000u32 as i32);
                    _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(from.cast()), high))
                }
            }
            #[inline(always)]
            unsafe fn dot_bf16(acc: __m512, w: *const u8, x: u32) -> __m512 {
                unsafe { $dot(acc, w, x) }
            }
            #[inline(always)]
            unsafe fn zip_bf16(to: *mut u32, a: *const u16, b: *const u16) {
                unsafe {
                    let a = _mm512_cvtepu16_epi32(_mm256_loadu_si256(a.cast()));
                    let b = _mm512_cvtepu16_epi32(_mm256_loadu_si256(b.cast()));
                    _mm512_storeu_si512(to.cast(), _mm512_or_si512(a, _mm512_slli_epi32::<16>(b)))
                }
            }
            #[inline(always)]
            unsafe fn transpose(from: [*const u32; 16], to: *mut u32) {
                unsafe { transpose_512(from, to) }
            }
            #[inline(always)]
            unsafe fn words(x: u32) -> __m512i {
                unsafe { _mm512_set1_epi32(x as i32) }
            }
            #[inline(always)]
            unsafe fn load_words(from: *const u8) -> __m512i {
                unsafe { _mm512_loadu_si512(from.cast()) }
            }
            #[inline(always)]
            unsafe fn and(a: __m512i, b: __m512i) -> __m512i {
                unsafe { _mm512_and_si512(a, b) }
            }
            #[inline(always)]
            unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
                unsafe { _mm512_or_si512(a, b) }
            }
            #[inline(always)]
            unsafe fn shift_right(x: __m512i, by: u32) -> __m512i {
                unsafe { _mm512_srlv_epi32(x, _mm512_set1_epi32(by as i32)) }
            }
            #[inline(always)]
            unsafe fn shift_left(x: __m512i, by: u32) -> __m512i {
                unsafe { _mm512_sllv_epi32(x, _mm512_set1_epi32(by as i32)) }
            }
            #[inline(always)]
            unsafe fn dot_bytes(acc: __m512i, w: __m512i, x: u32) -> __m512i {
                unsafe { $dot_bytes(acc, w, x) }
            }
            #[inline(always)]
            unsafe fn to_f32(x: __m512i) -> __m512 {
                unsafe { _mm512_cvtepi32_ps(x) }
            }
            #[inline(always)]
            unsafe fn load_f16(from: *const u8) -> __m512 {
                unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
            }
            #[inline(always)]
            unsafe fn load_u8(from: *const u8) -> __m512 {
                unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()))) }
            }
            #[inline(always)]
            unsafe fn load_i8(from: *const u8) -> __m512 {
                unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
            }
            #[inline(always)]
            unsafe fn load_bytes(from: *const u8) -> __m512i {
                unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast())) }
            }
            #[inline(always)]
            unsafe fn store_bytes(to: *mut u8, x: __m512i) {
                unsafe { _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(x)) }
            }
            #[inline(always)]
            unsafe fn add_words(a: __m512i, b: __m512i) -> __m512i {
                unsafe { _mm512_add_epi32(a, b) }
            }
            #[inline(always)]
            unsafe fn bits(x: __m512) -> __m512i {
                unsafe { _mm512_castps_si512(x) }
            }
            #[inline(always)]
            unsafe fn from_bits(x: __m512i) -> __m512 {
                unsafe { _mm512_castsi512_ps(x) }
            }
            #[inline(always)]
            unsafe fn prefetch(line: *const u8) {
                unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) }
            }
            #[inline(always)]
            unsafe fn sum(x: __m512) -> f32 {
                unsafe {
                    let x = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
                    fold_256!(x, _mm256_add_ps, _mm_add_ps, _mm_add_ss)
                }
            }
            #[inline(always)]
            unsafe fn max(x: __m512) -> f32 {
                unsafe {
                    let x = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
                    fold_256!(x, _mm256_max_ps, _mm_max_ps, _mm_max_ss)
                }
            }
            #[inline(always)]
            unsafe fn load_some(from: *const f32, count: usize) -> __m512 {
                unsafe { _mm512_maskz_loadu_ps(((1u32 << count) - 1) as u16, from) }
            }
            #[inline(always)]
            unsafe fn store_some(to: *mut f32, x: __m512, count: usize) {
                unsafe { _mm512_mask_storeu_ps(to, ((1u32 << count) - 1) as u16, x) }
            }
        }
    };
}

avx512_lanes!(Avx512, dot_lanes, dot_bytes_512);
avx512_lanes!(Avx512Vnni, dot_lanes, dot_vnni);
avx512_lanes!(Avx512Bf16, dot_512, dot_vnni);

#[inline(always)]
unsafe fn dot_vnni(acc: __m512i, w: __m512i, x: u32) -> __m512i {
    // SAFETY: the trait's contract.
    unsafe { _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x as i32)) }
}

/// Even and odd bytes as 16-bit numbers: `vpmaddubsw` would saturate.
#[inline(always)]
unsafe fn dot_bytes_512(acc: __m512i, w: __m512i, x: u32) -> __m512i {
    // SAFETY: the trait's contract.
    unsafe {
        let x = _mm512_set1_epi32(x as i32);
        let (w_even, w_odd) = (_mm512_and_si512(w, _mm512_set1_epi16(0xff)), _mm512_srli_epi16::<8>(w));
        let (x_even, x_odd) = (_mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(x)), _mm512_srai_epi16::<8>(x));
        let products = _mm512_add_epi32(_mm512_madd_epi16(w_even, x_even), _mm512_madd_epi16(w_odd, x_odd));
        _mm512_add_epi32(acc, products)
    }
}

#[inline(always)]
unsafe fn dot_512(acc: __m512, w: *const u8, x: u32) -> __m512 {
    // SAFETY: the trait's contract.
    unsafe {
        let w = std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(w.cast()));
        let x = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(x as i32));
        _mm512_dpbf16_ps(acc, w, x)
    }
}

/// `vdpbf16ps` lane by lane: profile `bf16dp` does not run here outside tests.
unsafe fn dot_lanes(acc: __m512, w: *const u8, x: u32) -> __m512 {
    // SAFETY: the trait's contract; both types are 16 f32.
    unsafe {
        let acc = std::mem::transmute::<__m512, [f32; 16]>(acc);
        std::mem::transmute::<[f32; 16], __m512>(super::lanes::Scalar::dot_bf16(acc, w, x))
    }
}

/// Four rows' quarters side by side, then two rounds of unpacking.
#[inline(always)]
unsafe fn transpose_512(from: [*const u32; 16], to: *mut u32) {
    // SAFETY: the trait's contract.
    unsafe {
        let mut quarter = 0;
        while quarter < 4 {
            let mut r = [_mm512_setzero_si512(); 4];
            let mut i = 0;
            while i < 4 {
                // Rows i, i+4, i+8, i+12 in the four 128-bit parts.
                let part = |row: usize| _mm_loadu_si128(from[row].add(4 * quarter).cast());
                let x = _mm512_castsi128_si512(part(i));
                let x = _mm512_inserti32x4::<1>(x, part(i + 4));
                let x = _mm512_inserti32x4::<2>(x, part(i + 8));
                r[i] = _mm512_inserti32x4::<3>(x, part(i + 12));
                i += 1;
            }
            let (a, b) = (_mm512_unpacklo_epi32(r[0], r[1]), _mm512_unpackhi_epi32(r[0], r[1]));
            let (c, d) = (_mm512_unpacklo_epi32(r[2], r[3]), _mm512_unpackhi_epi32(r[2], r[3]));
            let to = to.add(4 * quarter * 64);
            _mm512_storeu_si512(to.cast(), _mm512_unpacklo_epi64(a, c));
            _mm512_storeu_si512(to.add(64).cast(), _mm512_unpackhi_epi64(a, c));
            _mm512_storeu_si512(to.add(128).cast(), _mm512_unpacklo_epi64(b, d));
            _mm512_storeu_si512(to.add(192).cast(), _mm512_unpackhi_epi64(b, d));
            quarter += 1;
        }
    }
}

/// One 256-bit operation on both halves.
macro_rules! both {
    ($op:ident($($x:expr),*)) => {
        [$op($($x[0]),*), $op($($x[1]),*)]
    };
}

// SAFETY (of each block): the trait's contract.
impl Lanes for Avx2 {
    type F = [__m256; 2];
    type I = [__m256i; 2];
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn splat(x: f32) -> [__m256; 2] {
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> [__m256; 2] {
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, x: [__m256; 2]) {
        unsafe {
            _mm256_storeu_ps(to, x[0]);
            _mm256_storeu_ps(to.add(8), x[1]);
        }
    }
    #[inline(always)]
    unsafe fn add(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        unsafe { both!(_mm256_add_ps(a, b)) }
    }
    #[inline(always)]
    unsafe fn sub(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        unsafe { both!(_mm256_sub_ps(a, b)) }
    }
    #[inline(always)]
    unsafe fn mul(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        unsafe { both!(_mm256_mul_ps(a, b)) }
    }
    #[inline(always)]
    unsafe fn div(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        unsafe { both!(_mm256_div_ps(a, b)) }
    }
    #[inline(always)]
    unsafe fn fma(a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        unsafe { both!(_mm256_fmadd_ps(a, b, c)) }
    }
    #[inline(always)]
    unsafe fn larger(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        unsafe { both!(_mm256_max_ps(a, b)) }
    }
    #[inline(always)]
    unsafe fn smaller(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        unsafe { both!(_mm256_min_ps(a, b)) }
    }
    #[inline(always)]
    unsafe fn select_less(a: [__m256; 2], b: [__m256; 2], then: [__m256; 2], otherwise: [__m256; 2]) -> [__m256; 2] {
        unsafe {
            let less = [_mm256_cmp_ps::<_CMP_LT_OQ>(a[0], b[0]), _mm256_cmp_ps::<_CMP_LT_OQ>(a[1], b[1])];
            both!(_mm256_blendv_ps(otherwise, then, less))
        }
    }
    #[inline(always)]
    unsafe fn power_of_two(t: [__m256; 2]) -> [__m256; 2] {
        unsafe { both!(power_of_two_256(t)) }
    }
    #[inline(always)]
    unsafe fn negate(x: [__m256; 2]) -> [__m256; 2] {
        unsafe {
            let sign = [_mm256_set1_ps(-0.0); 2];
            both!(_mm256_xor_ps(x, sign))
        }
    }
    #[inline(always)]
    unsafe fn round_bf16(x: [__m256; 2]) -> [__m256; 2] {
        unsafe { both!(round_bf16_256(x)) }
    }
    #[inline(always)]
    unsafe fn store_bf16(to: *mut u16, x: [__m256; 2]) {
        unsafe {
            let low = _mm256_srli_epi32::<16>(_mm256_castps_si256(x[0]));
            let high = _mm256_srli_epi32::<16>(_mm256_castps_si256(x[1]));
            let narrow = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high));
            _mm256_storeu_si256(to.cast(), narrow)
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> [__m256; 2] {
        unsafe { [widen_256(from), widen_256(from.add(8))] }
    }
    #[inline(always)]
    unsafe fn load_even(from: *const u8) -> [__m256; 2] {
        unsafe { [even_256(from), even_256(from.add(32))] }
    }
    #[inline(always)]
    unsafe fn load_odd(from: *const u8) -> [__m256; 2] {
        unsafe { [odd_256(from), odd_256(from.add(32))] }
    }
    #[inline(always)]
    unsafe fn dot_bf16(acc: [__m256; 2], w: *const u8, x: u32) -> [__m256; 2] {
        // SAFETY: both types are 16 f32.
        unsafe {
            let acc = std::mem::transmute::<[__m256; 2], [f32; 16]>(acc);
            std::mem::transmute::<[f32; 16], [__m256; 2]>(super::lanes::Scalar::dot_bf16(acc, w, x))
        }
    }
    #[inline(always)]
    unsafe fn zip_bf16(to: *mut u32, a: *const u16, b: *const u16) {
        unsafe {
            zip_256(to, a, b);
            zip_256(to.add(8), a.add(8), b.add(8));
        }
    }
    #[inline(always)]
    unsafe fn transpose(from: [*const u32; 16], to: *mut u32) {
        unsafe { super::lanes::Scalar::transpose(from, to) }
    }
    #[inline(always)]
    unsafe fn words(x: u32) -> [__m256i; 2] {
        unsafe { [_mm256_set1_epi32(x as i32); 2] }
    }
    #[inline(always)]
    unsafe fn load_words(from: *const u8) -> [__m256i; 2] {
        unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())] }
    }
    #[inline(always)]
    unsafe fn and(a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        unsafe { both!(_mm256_and_si256(a, b)) }
    }
    #[inline(always)]
    unsafe fn or(a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        unsafe { both!(_mm256_or_si256(a, b)) }
    }
    #[inline(always)]
    unsafe fn shift_right(x: [__m256i; 2], by: u32) -> [__m256i; 2] {
        unsafe {
            let by = [_mm256_set1_epi32(by as i32); 2];
            both!(_mm256_srlv_epi32(x, by))
        }
    }
    #[inline(always)]
    unsafe fn shift_left(x: [__m256i; 2], by: u32) -> [__m256i; 2] {
        unsafe {
            let by = [_mm256_set1_epi32(by as i32); 2];
            both!(_mm256_sllv_epi32(x, by))
        }
    }
    #[inline(always)]
    unsafe fn dot_bytes(acc: [__m256i; 2], w: [__m256i; 2], x: u32) -> [__m256i; 2] {
        unsafe {
            let x = [_mm256_set1_epi32(x as i32); 2];
            both!(dot_bytes_256(acc, w, x))
        }
    }
    #[inline(always)]
    unsafe fn to_f32(x: [__m256i; 2]) -> [__m256; 2] {
        unsafe { both!(_mm256_cvtepi32_ps(x)) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> [__m256; 2] {
        unsafe {
            let halves = [_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(16).cast())];
            both!(_mm256_cvtph_ps(halves))
        }
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> [__m256; 2] {
        unsafe {
            let bytes = [_mm_loadl_epi64(from.cast()), _mm_loadl_epi64(from.add(8).cast())];
            let words = both!(_mm256_cvtepu8_epi32(bytes));
            both!(_mm256_cvtepi32_ps(words))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> [__m256; 2] {
        unsafe {
            let bytes = [_mm_loadl_epi64(from.cast()), _mm_loadl_epi64(from.add(8).cast())];
            let words = both!(_mm256_cvtepi8_epi32(bytes));
            both!(_mm256_cvtepi32_ps(words))
        }
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> [__m256i; 2] {
        unsafe {
            let bytes = [_mm_loadl_epi64(from.cast()), _mm_loadl_epi64(from.add(8).cast())];
            both!(_mm256_cvtepu8_epi32(bytes))
        }
    }
    #[inline(always)]
    unsafe fn store_bytes(to: *mut u8, x: [__m256i; 2]) {
        unsafe {
            let low = [_mm256_set1_epi32(0xff); 2];
            let x = both!(_mm256_and_si256(x, low));
            // Words of both, by 128-bit halves; put in order, they narrow once more.
            let halves = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(x[0], x[1]));
            let bytes = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi16(halves, halves));
            _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(bytes))
        }
    }
    #[inline(always)]
    unsafe fn add_words(a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        unsafe { both!(_mm256_add_epi32(a, b)) }
    }
    #[inline(always)]
    unsafe fn bits(x: [__m256; 2]) -> [__m256i; 2] {
        unsafe { both!(_mm256_castps_si256(x)) }
    }
    #[inline(always)]
    unsafe fn from_bits(x: [__m256i; 2]) -> [__m256; 2] {
        unsafe { both!(_mm256_castsi256_ps(x)) }
    }
    #[inline(always)]
    unsafe fn prefetch(line: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) }
    }
    #[inline(always)]
    unsafe fn sum(x: [__m256; 2]) -> f32 {
        unsafe { fold_256!(_mm256_add_ps(x[0], x[1]), _mm256_add_ps, _mm_add_ps, _mm_add_ss) }
    }
    #[inline(always)]
    unsafe fn max(x: [__m256; 2]) -> f32 {
        unsafe { fold_256!(_mm256_max_ps(x[0], x[1]), _mm256_max_ps, _mm_max_ps, _mm_max_ss) }
    }
}

// SAFETY (of the helpers below): as for the trait's functions that call them.
#[inline(always)]
unsafe fn dot_bytes_256(acc: __m256i, w: __m256i, x: __m256i) -> __m256i {
    unsafe {
        let (w_even, w_odd) = (_mm256_and_si256(w, _mm256_set1_epi16(0xff)), _mm256_srli_epi16::<8>(w));
        let (x_even, x_odd) = (_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x)), _mm256_srai_epi16::<8>(x));
        let products = _mm256_add_epi32(_mm256_madd_epi16(w_even, x_even), _mm256_madd_epi16(w_odd, x_odd));
        _mm256_add_epi32(acc, products)
    }
}

#[inline(always)]
unsafe fn power_of_two_256(t: __m256) -> __m256 {
    unsafe {
        let n = _mm256_slli_epi32::<23>(_mm256_castps_si256(t));
        _mm256_castsi256_ps(_mm256_add_epi32(n, _mm256_set1_epi32(0x3f80_0000)))
    }
}

#[inline(always)]
unsafe fn round_bf16_256(x: __m256) -> __m256 {
    unsafe {
        let bits = _mm256_castps_si256(x);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
        let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(x, x);
        let up = _mm256_blendv_ps(_mm256_castsi256_ps(up), _mm256_castsi256_ps(quiet), nan);
        _mm256_and_ps(up, _mm256_castsi256_ps(_mm256_set1_epi32(0xffff_0000u32 as i32)))
    }
}

#[inline(always)]
unsafe fn widen_256(from: *const u16) -> __m256 {
    unsafe {
        let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
    }
}

#[inline(always)]
unsafe fn even_256(from: *const u8) -> __m256 {
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_loadu_si256(from.cast()))) }
}

#[inline(always)]
unsafe fn odd_256(from: *const u8) -> __m256 {
    unsafe {
        let high = _mm256_set1_epi32(0xffff_0000u32 as i32);
        _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(from.cast()), high))
    }
}

#[inline(always)]
unsafe fn zip_256(to: *mut u32, a: *const u16, b: *const u16) {
    unsafe {
        let a = _mm256_cvtepu16_epi32(_mm_loadu_si128(a.cast()));
        let b = _mm256_cvtepu16_epi32(_mm_loadu_si128(b.cast()));
        _mm256_storeu_si256(to.cast(), _mm256_or_si256(a, _mm256_slli_epi32::<16>(b)))
    }
}
