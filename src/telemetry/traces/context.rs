//! `traceparent`: a span as others are told of it (W3C Trace Context, section 3.2).

/// The length of a `traceparent` of version 00, in bytes.
const LEN: usize = 55;

/// A span of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// Never 0.
    pub trace_id: u128,
    /// Never 0.
    pub span_id: u64,
    /// Whether its spans are exported.
    pub is_sampled: bool,
}

impl TraceContext {
    /// Reads the value of the field; `None` if it is not valid. Of a version that is not known yet, what is known of all
    /// versions is read (section 3.2.4).
    pub fn parse(value: &[u8]) -> Option<Self> {
        if value.len() < LEN || [2, 35, 52].iter().any(|&at| value[at] != b'-') {
            return None;
        }
        match hex(&value[..2])? {
            0 if value.len() != LEN => return None,
            0xff => return None,
            _ if value.get(LEN).is_some_and(|&byte| byte != b'-') => return None,
            _ => {}
        }
        let trace_id = hex(&value[3..35])?;
        let span_id = hex(&value[36..52])? as u64;
        let is_sampled = hex(&value[53..LEN])? & 1 == 1;
        (trace_id != 0 && span_id != 0).then_some(TraceContext { trace_id, span_id, is_sampled })
    }

    /// The value of the field.
    pub fn to_header(self) -> String {
        let TraceContext { trace_id, span_id, is_sampled } = self;
        format!("00-{trace_id:032x}-{span_id:016x}-{:02x}", u8::from(is_sampled))
    }
}

/// A number of at most 32 digits; letters are in lower case (section 3.2.2.1).
fn hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0, |number, digit| {
        let value = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(number << 4 | u128::from(value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALID: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn what_is_valid_is_read_and_written_as_it_was() {
        let context = TraceContext::parse(VALID.as_bytes()).unwrap();
        assert_eq!(context.trace_id, 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736);
        assert_eq!((context.span_id, context.is_sampled), (0x00f0_67aa_0ba9_02b7, true));
        assert_eq!(context.to_header(), VALID);
        let unsampled = VALID.replace("-01", "-02");
        assert!(!TraceContext::parse(unsampled.as_bytes()).unwrap().is_sampled);
        // Of another version, the part that all have.
        for later in [VALID.replacen("00", "cc", 1), VALID.replacen("00", "cc", 1) + "-more"] {
            assert_eq!(TraceContext::parse(later.as_bytes()), Some(context), "{later}");
        }
    }

    #[test]
    fn what_is_not_valid_is_nothing() {
        for bad in [
            "".to_owned(),
            VALID[..54].to_owned(),
            format!("{VALID}-more"),
            VALID.replacen("00", "ff", 1),
            VALID.replacen("00", "cc", 1) + "more",
            VALID.to_uppercase(),
            VALID.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)),
            VALID.replace("00f067aa0ba902b7", &"0".repeat(16)),
            VALID.replace('-', "_"),
            VALID.replace("-01", "-0g"),
        ] {
            assert_eq!(TraceContext::parse(bad.as_bytes()), None, "{bad}");
        }
    }
}
