//! Protocol buffers by hand: field numbers are written out as Kubernetes has published them, so that an error in the
//! plugin's own description cannot hide by being made on both sides.

/// A message: its fields in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wire(pub(crate) Vec<u8>);

/// Wire types.
const VARINT: u64 = 0;
const BYTES: u64 = 2;

impl Wire {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    pub(crate) fn number(mut self, field: u64, value: u64) -> Self {
        self.varint(field << 3 | VARINT);
        self.varint(value);
        self
    }

    pub(crate) fn bytes(mut self, field: u64, value: &[u8]) -> Self {
        self.varint(field << 3 | BYTES);
        self.varint(value.len() as u64);
        self.0.extend_from_slice(value);
        self
    }

    pub(crate) fn text(self, field: u64, value: &str) -> Self {
        self.bytes(field, value.as_bytes())
    }

    pub(crate) fn texts<'a>(self, field: u64, values: impl IntoIterator<Item = &'a str>) -> Self {
        values.into_iter().fold(self, |message, value| message.text(field, value))
    }

    pub(crate) fn message(self, field: u64, value: &Self) -> Self {
        self.bytes(field, &value.0)
    }

    /// The fields: number, and the value as bytes (the digits of a number, little-endian).
    pub(crate) fn fields(&self) -> Vec<(u64, Value)> {
        let mut rest = self.0.as_slice();
        let mut fields = Vec::new();
        while !rest.is_empty() {
            let key = take_varint(&mut rest);
            let value = match key & 7 {
                VARINT => Value::Number(take_varint(&mut rest)),
                BYTES => {
                    let length = take_varint(&mut rest) as usize;
                    let (value, left) = rest.split_at(length);
                    rest = left;
                    Value::Bytes(value.to_vec())
                }
                other => panic!("wire type {other} is not used in this interface"),
            };
            fields.push((key >> 3, value));
        }
        fields
    }

    /// Every message in this field; there must be no other field than those named.
    pub(crate) fn all(&self, field: u64) -> Vec<Self> {
        self.fields()
            .into_iter()
            .filter(|(number, _)| *number == field)
            .map(|(_, value)| value.message())
            .collect()
    }

    /// Every text in this field.
    pub(crate) fn all_texts(&self, field: u64) -> Vec<String> {
        self.all(field).into_iter().map(|value| String::from_utf8(value.0).expect("text")).collect()
    }

    /// The text in this field, empty if it is absent.
    pub(crate) fn one_text(&self, field: u64) -> String {
        self.all_texts(field).pop().unwrap_or_default()
    }
}

/// A field's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Number(u64),
    Bytes(Vec<u8>),
}

impl Value {
    fn message(self) -> Wire {
        match self {
            Self::Bytes(bytes) => Wire(bytes),
            Self::Number(number) => panic!("a number, {number}, where a message belongs"),
        }
    }
}

fn take_varint(rest: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, left) = rest.split_first().expect("a whole number");
        *rest = left;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return value;
        }
    }
    panic!("a number of more than 64 bits")
}

/// Hands messages over as they are.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Raw;

impl tonic::codec::Codec for Raw {
    type Encode = Wire;
    type Decode = Wire;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl tonic::codec::Encoder for Raw {
    type Item = Wire;
    type Error = tonic::Status;

    fn encode(&mut self, item: Wire, to: &mut tonic::codec::EncodeBuf<'_>) -> Result<(), tonic::Status> {
        bytes::BufMut::put_slice(to, &item.0);
        Ok(())
    }
}

impl tonic::codec::Decoder for Raw {
    type Item = Wire;
    type Error = tonic::Status;

    fn decode(&mut self, from: &mut tonic::codec::DecodeBuf<'_>) -> Result<Option<Wire>, tonic::Status> {
        let length = bytes::Buf::remaining(from);
        Ok(Some(Wire(bytes::Buf::copy_to_bytes(from, length).to_vec())))
    }
}
