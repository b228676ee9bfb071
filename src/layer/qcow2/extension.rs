//! Header extensions: the list between the header and the backing file name.
//!
//! Pure: no I/O. Kept byte for byte, also those that we do not know (qcow2 specification, *Header
//! extensions*): a list decoded and encoded again is the same bytes up to its end marker.

use crate::error::{Error, Result};

/// Extension types.
pub mod kind {
    /// End of the list.
    pub const END: u32 = 0;
    /// Name of the backing file's format.
    pub const BACKING_FORMAT: u32 = 0xe279_2aca;
    /// Names of feature bits.
    pub const FEATURE_NAMES: u32 = 0x6803_f857;
    /// Persistent dirty bitmaps.
    pub const BITMAPS: u32 = 0x2385_2875;
    /// Name of the external data file.
    pub const DATA_FILE: u32 = 0x4441_5441;
}

/// One extension: its type and its data, without padding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// What it is; see `kind`.
    pub kind: u32,
    /// Its payload.
    pub data: Vec<u8>,
}

/// The list, in the order in which it stands in the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extensions(pub Vec<Extension>);

impl Extensions {
    /// Decodes the list that begins with `bytes`. It ends at its end marker or with the bytes.
    /// `start` is their offset in the file, for messages.
    ///
    /// # Errors
    /// An extension reaches beyond the area.
    pub fn decode(bytes: &[u8], start: u64) -> Result<Self> {
        let mut list = Vec::new();
        let mut rest = bytes;
        while let Some((head, body)) = rest.split_first_chunk::<8>() {
            let [k0, k1, k2, k3, l0, l1, l2, l3] = *head;
            let kind = u32::from_be_bytes([k0, k1, k2, k3]);
            let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
            if kind == kind::END {
                break;
            }
            let Some(data) = body.get(..length) else {
                let at = start + (bytes.len() - rest.len()) as u64;
                let what = format!("header extension {kind:#x} of {length} bytes leaves its place");
                return Err(Error::corrupt(what).offset(at));
            };
            list.push(Extension { kind, data: data.to_vec() });
            rest = body.get(length.next_multiple_of(8)..).unwrap_or_default();
        }
        Ok(Self(list))
    }

    /// Encodes the list with padding and end marker.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for extension in &self.0 {
            bytes.extend(extension.kind.to_be_bytes());
            // A length that came from a u32 field, or from a name of at most a few bytes.
            bytes.extend((extension.data.len() as u32).to_be_bytes());
            bytes.extend(&extension.data);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes.extend([0; 8]);
        bytes
    }

    /// The data of the first extension of that type.
    pub fn find(&self, kind: u32) -> Option<&[u8]> {
        self.0.iter().find(|e| e.kind == kind).map(|e| e.data.as_slice())
    }

    /// An extension that holds a name.
    pub fn find_text(&self, kind: u32) -> Option<String> {
        let data = self.find(kind)?;
        // QEMU reads it as a C string: some programs pad it.
        let end = data.iter().position(|&byte| byte == 0).unwrap_or(data.len());
        Some(String::from_utf8_lossy(&data[..end]).into_owned())
    }

    /// Replaces the data of an extension where it stands, puts it first if it is new, or takes it
    /// out.
    pub(crate) fn set(&mut self, kind: u32, data: Option<&[u8]>) {
        let place = self.0.iter().position(|e| e.kind == kind);
        match (data, place) {
            (Some(data), Some(i)) => self.0[i].data = data.to_vec(),
            (Some(data), None) => self.0.insert(0, Extension { kind, data: data.to_vec() }),
            (None, Some(i)) => drop(self.0.remove(i)),
            (None, None) => {}
        }
    }

    /// The name that the image itself gives to an incompatible feature bit. Entries of the table
    /// have 48 bytes: type (0 incompatible), bit, name padded with zeros.
    pub fn incompatible_feature_name(&self, bit: u32) -> Option<String> {
        let table = self.find(kind::FEATURE_NAMES)?;
        let entry = table.chunks_exact(48).find(|e| e[0] == 0 && u32::from(e[1]) == bit)?;
        let name = entry[2..].split(|&b| b == 0).next().unwrap_or_default();
        let name: String = String::from_utf8_lossy(name).chars().filter(|c| !c.is_control()).collect();
        (!name.is_empty()).then_some(name)
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn lists() -> impl Strategy<Value = Extensions> {
        let extension = (1u32.., vec(any::<u8>(), 0..100)).prop_map(|(kind, data)| Extension { kind, data });
        vec(extension, 0..8).prop_map(Extensions)
    }

    proptest! {
        #[test]
        fn no_bytes_make_decoding_panic(bytes in vec(any::<u8>(), 0..300), start: u32) {
            let _ = Extensions::decode(&bytes, start.into());
        }

        #[test]
        fn what_is_encoded_decodes_to_the_same(list in lists()) {
            prop_assert_eq!(Extensions::decode(&list.encode(), 0).unwrap(), list);
        }

        #[test]
        fn no_feature_table_makes_looking_up_a_name_panic(table in vec(any::<u8>(), 0..200), bit in 0u32..64) {
            let list = Extensions(vec![Extension { kind: kind::FEATURE_NAMES, data: table }]);
            let _ = list.incompatible_feature_name(bit);
        }
    }

    #[test]
    fn a_list_survives_decoding_and_encoding() {
        let bytes =
            b"\xe2\x79\x2a\xca\0\0\0\x03raw\0\0\0\0\0\x12\x34\x56\x78\0\0\0\x08payload!\0\0\0\0\0\0\0\0";
        let list = Extensions::decode(bytes, 112).unwrap();
        assert_eq!(list.find_text(kind::BACKING_FORMAT).as_deref(), Some("raw"));
        assert_eq!(list.encode(), bytes);
    }

    #[test]
    fn a_length_beyond_the_area_is_refused_with_its_offset() {
        let error = Extensions::decode(b"\x12\x34\x56\x78\xff\xff\xff\xff", 112).unwrap_err();
        assert!(error.to_string().contains("offset 0x70"), "{error}");
    }
}
