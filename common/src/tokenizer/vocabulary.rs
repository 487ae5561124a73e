//! What each id stands for: bytes for ordinary token IDs, a name for special ones.

use std::collections::HashMap;

/// All token IDs of a tokenizer in one flat buffer.
pub struct Vocabulary {
    pub(super) eos_id: u32,
    bytes: Vec<u8>,
    /// Where the bytes of id `i` begin; one entry more than there are token IDs.
    starts: Vec<u32>,
    special: Vec<bool>,
    special_ids: HashMap<String, u32>,
}

/// One id when a vocabulary is built.
pub(super) enum Entry {
    /// An ordinary token and its bytes.
    Ordinary(Vec<u8>),
    /// A special token and its name.
    Special(String),
    /// No token has this id.
    Unused,
}

impl Vocabulary {
    /// `entries[i]` is id `i`. Fails when the bytes of all tokens pass 4 GiB.
    pub(super) fn new(entries: impl IntoIterator<Item = Entry>) -> Result<Self, String> {
        let mut vocabulary =
            Self { eos_id: 0, bytes: Vec::new(), starts: vec![0], special: Vec::new(), special_ids: HashMap::new() };
        for entry in entries {
            let id = vocabulary.special.len() as u32;
            vocabulary.special.push(matches!(entry, Entry::Special(_)));
            match entry {
                Entry::Ordinary(bytes) => vocabulary.bytes.extend_from_slice(&bytes),
                Entry::Special(name) => {
                    vocabulary.bytes.extend_from_slice(name.as_bytes());
                    vocabulary.special_ids.insert(name, id);
                }
                Entry::Unused => {}
            }
            let end =
                u32::try_from(vocabulary.bytes.len()).map_err(|_| "the vocabulary is larger than 4 GiB".to_owned())?;
            vocabulary.starts.push(end);
        }
        Ok(vocabulary)
    }

    /// Number of token IDs, special ones included; every id is below it.
    #[allow(clippy::len_without_is_empty)] // a tokenizer without token IDs can't be loaded
    pub fn len(&self) -> usize {
        self.special.len()
    }

    fn entry(&self, id: u32) -> Option<(&[u8], bool)> {
        let index = id as usize;
        let special = *self.special.get(index)?;
        let range = *self.starts.get(index)? as usize..*self.starts.get(index + 1)? as usize;
        Some((self.bytes.get(range)?, special))
    }

    /// The id that ends a response.
    pub fn eos_id(&self) -> u32 {
        self.eos_id
    }

    /// The bytes of an ordinary id, which need not be whole characters; `None` for special and unknown token IDs.
    pub fn ordinary(&self, id: u32) -> Option<&[u8]> {
        let (bytes, special) = self.entry(id)?;
        (!special && !bytes.is_empty()).then_some(bytes)
    }

    /// The name of a special id; `None` for ordinary and unknown token IDs.
    pub fn special_name(&self, id: u32) -> Option<&str> {
        let (bytes, special) = self.entry(id)?;
        if !special {
            return None;
        }
        std::str::from_utf8(bytes).ok()
    }

    /// The id of a special token.
    pub fn special_id(&self, name: &str) -> Option<u32> {
        self.special_ids.get(name).copied()
    }
}
