//! The record of a quantized page: one head's keys or values, and where its parts lie.

/// Fewer tokens would have more scales than codes.
pub const LEAST_BLOCK: usize = 16;

/// Bits of a code in a quantized page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bits {
    /// A byte a code.
    Eight,
    /// Two codes a byte.
    Four,
}

impl Bits {
    /// Codes of that many bits, if there are such.
    pub fn of(number: u8) -> Option<Self> {
        match number {
            8 => Some(Self::Eight),
            4 => Some(Self::Four),
            _ => None,
        }
    }
}

/// What is quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// A scale and a minimum a channel, over the page's tokens.
    Keys,
    /// A scale and a minimum a token, over its channels, and an exponent a channel.
    Values,
}

/// What a record's bytes mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Keys or values.
    pub part: Part,
    /// Of a code.
    pub bits: Bits,
    /// Tokens a page.
    pub block: usize,
    /// Channels of a token.
    pub width: usize,
}

impl Format {
    /// True for what can be quantized: a power of two of tokens, at least 16, and a channel.
    pub fn is_sound(&self) -> bool {
        self.block >= LEAST_BLOCK && self.block.is_power_of_two() && self.width > 0
    }

    /// Bytes of a group's codes: a channel's of keys, a token's of values.
    pub(super) fn row(&self) -> usize {
        let members = match self.part {
            Part::Keys => self.block,
            Part::Values => self.width,
        };
        if self.bits == Bits::Four { members.div_ceil(2) } else { members }
    }

    /// Groups that have a scale and a minimum.
    pub(super) fn groups(&self) -> usize {
        match self.part {
            Part::Keys => self.width,
            Part::Values => self.block,
        }
    }

    /// Bytes of all codes.
    pub(in crate::kernel) fn codes(&self) -> usize {
        self.groups() * self.row()
    }

    /// Bytes of a record.
    pub fn bytes(&self) -> usize {
        let exponents = if self.part == Part::Values { self.width } else { 0 };
        (self.codes() + 4 * self.groups() + exponents).next_multiple_of(16)
    }

    /// The largest code.
    pub(super) fn levels(&self) -> f32 {
        if self.bits == Bits::Four { 15.0 } else { 255.0 }
    }
}
