//! e4m3fn, the 8-bit format of the weights: sign, 4 exponent bits (bias 7), 3 mantissa bits. The maximum is 448, the
//! smallest subnormal 2^-9; there are no infinities, and NaN is 0x7f and 0xff.

/// The maximum value.
pub const MAX: f32 = 448.0;

/// The value of a code.
pub fn decode(code: u8) -> f32 {
    DECODED[code as usize]
}

/// The code nearest to a value, ties to even. Values beyond ±448 saturate. NaN gives NaN.
pub fn encode(value: f32) -> u8 {
    let sign = ((value.to_bits() >> 24) & 0x80) as u8;
    if value.is_nan() {
        return sign | 0x7f;
    }
    let magnitude = value.abs();
    if magnitude >= MAX {
        return sign | 0x7e;
    }
    if magnitude < SMALLEST_NORMAL {
        // multiples of 2^-9; 8 is the smallest normal value, whose code is 8 as well
        return sign | (magnitude * 512.0).round_ties_even() as u8;
    }
    let bits = magnitude.to_bits();
    let dropped = 23 - 3;
    let odd = (bits >> dropped) & 1;
    let rounded = bits + ((1 << (dropped - 1)) - 1) + odd;
    // exponent and mantissa together, with the bias changed from 127 to 7
    let code = (rounded >> dropped) - ((127 - 7) << 3);
    sign | code.min(0x7e) as u8
}

/// A value rounded to e4m3 and back.
pub fn round(value: f32) -> f32 {
    decode(encode(value))
}

const SMALLEST_NORMAL: f32 = 1.0 / 64.0;

static DECODED: [f32; 256] = table();

const fn table() -> [f32; 256] {
    let mut elements = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let exponent = (code >> 3) & 0xf;
        let mantissa = (code & 7) as f32;
        let magnitude = if exponent == 0xf && code & 7 == 7 {
            f32::NAN
        } else if exponent == 0 {
            mantissa / 512.0
        } else {
            (1.0 + mantissa / 8.0) * f32::from_bits(((exponent + 120) as u32) << 23)
        };
        elements[code] = if code & 0x80 != 0 { -magnitude } else { magnitude };
        code += 1;
    }
    elements
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_every_code() {
        for code in 0..=255u8 {
            let value = decode(code);
            if value.is_nan() {
                assert_eq!(code & 0x7f, 0x7f);
            } else {
                assert_eq!(encode(value), code, "{value}");
            }
        }
    }

    #[test]
    fn rounds_midpoints_to_the_even_code() {
        for code in 0..0x7eu8 {
            let middle = (decode(code) + decode(code + 1)) / 2.0;
            let even = if code % 2 == 0 { code } else { code + 1 };
            assert_eq!(encode(middle), even, "{middle}");
            assert_eq!(encode(-middle), even | 0x80, "{middle}");
        }
        assert_eq!(encode(1e9), 0x7e);
        assert_eq!(encode(f32::NEG_INFINITY), 0xfe);
    }
}
