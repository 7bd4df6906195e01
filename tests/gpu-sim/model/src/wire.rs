//! What programs and the simulator say to each other over `SIM/sim.sock`.
//!
//! Requests have a fixed size; replies have a fixed head and a number of [`Record`]s. All numbers are native u64: both ends
//! run on one machine and come from one build.

use std::io::{self, Read, Write};

/// Changes with the messages.
pub const VERSION: u64 = 1;

/// What a program asks. The first number on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Op {
    /// (version): be a client. Reply: slot, space slot.
    Hello = 1,
    /// (base, len). Reply: first block, blocks.
    Register = 2,
    /// (base, len).
    Unregister = 3,
    /// (card, bytes). Reply: when the evictions are done; records.
    AllocatePlain = 4,
    /// (card, bytes).
    FreePlain = 5,
    /// (base, len, card or [`TO_HOST`], protected): at most a window of blocks. Reply: when done, bytes covered; records.
    Prefetch = 6,
    /// (base, len): at most a window of blocks. Reply: when done, bytes covered; records.
    TouchCpu = 7,
    /// What has happened so far, as JSON in the text. Needs no greeting.
    Stats = 8,
}

/// The destination of a prefetch to host memory.
pub const TO_HOST: u64 = u64::MAX;

impl Op {
    /// From the wire.
    pub fn from_value(value: u64) -> Option<Self> {
        Some(match value {
            1 => Self::Hello,
            2 => Self::Register,
            3 => Self::Unregister,
            4 => Self::AllocatePlain,
            5 => Self::FreePlain,
            6 => Self::Prefetch,
            7 => Self::TouchCpu,
            8 => Self::Stats,
            _ => return None,
        })
    }
}

/// A request: operation and arguments.
pub type Request = [u64; 5];

/// Outcome of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Memory is taken: values are (wanted, free).
    OutOfMemory = 1,
    /// Refused; the text says why.
    Refused = 2,
}

/// Something of the driver's that happened in the program's context, which the program announces itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Address of the owner's `events*`.
    pub events: u64,
    /// A CPU fault at `address` (`write` in `bytes`), else a migration.
    pub cpu_fault: bool,
    /// Processor from which bytes came.
    pub src: u32,
    /// Processor to which they went.
    pub dst: u32,
    /// First byte.
    pub address: u64,
    /// Bytes moved.
    pub bytes: u64,
    /// The driver's make-resident cause.
    pub cause: u32,
}

/// A reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// How it went.
    pub status: Status,
    /// By operation.
    pub values: [u64; 2],
    /// What the program announces.
    pub records: Vec<Record>,
    /// Why it was refused.
    pub text: String,
}

impl Reply {
    /// Done, with two values.
    pub fn ok(values: [u64; 2]) -> Self {
        Self { status: Status::Ok, values, records: Vec::new(), text: String::new() }
    }

    /// Refused, and why.
    pub fn refused(why: &impl ToString) -> Self {
        Self { status: Status::Refused, values: [0; 2], records: Vec::new(), text: why.to_string() }
    }

    /// Writes it in one call.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let head = [
            self.status as u64,
            self.values[0],
            self.values[1],
            self.records.len() as u64,
            self.text.len() as u64,
        ];
        let mut bytes = words_to_bytes(&head);
        for record in &self.records {
            bytes.extend(words_to_bytes(&[
                record.events,
                u64::from(record.cpu_fault) << 32 | u64::from(record.cause),
                u64::from(record.src) << 32 | u64::from(record.dst),
                record.address,
                record.bytes,
            ]));
        }
        bytes.extend_from_slice(self.text.as_bytes());
        out.write_all(&bytes)
    }

    /// Reads one.
    pub fn read(input: &mut impl Read) -> io::Result<Self> {
        let head: [u64; 5] = read_words(input)?;
        let status = match head[0] {
            0 => Status::Ok,
            1 => Status::OutOfMemory,
            2 => Status::Refused,
            _ => return Err(io::Error::other("the simulator's reply makes no sense")),
        };
        if head[3] > 1 << 20 || head[4] > 1 << 24 {
            return Err(io::Error::other("the simulator's reply is too long"));
        }
        let mut records = Vec::with_capacity(head[3] as usize);
        for _ in 0..head[3] {
            let [events, kind, processors, address, bytes] = read_words(input)?;
            records.push(Record {
                events,
                cpu_fault: kind >> 32 != 0,
                cause: kind as u32,
                src: (processors >> 32) as u32,
                dst: processors as u32,
                address,
                bytes,
            });
        }
        let mut text = vec![0; head[4] as usize];
        input.read_exact(&mut text)?;
        Ok(Self {
            status,
            values: [head[1], head[2]],
            records,
            text: String::from_utf8_lossy(&text).into_owned(),
        })
    }
}

/// Bytes of a request.
pub fn words_to_bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Reads numbers.
pub fn read_words<const N: usize>(input: &mut impl Read) -> io::Result<[u64; N]> {
    let mut words = [0; N];
    for word in &mut words {
        let mut bytes = [0; 8];
        input.read_exact(&mut bytes)?;
        *word = u64::from_ne_bytes(bytes);
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_survives_the_wire() {
        let record =
            Record { events: 7, cpu_fault: true, src: 1, dst: 9, address: 0x1000, bytes: 1 << 21, cause: 6 };
        let reply = Reply {
            status: Status::Refused,
            values: [1, u64::MAX],
            records: vec![record, Record { cpu_fault: false, ..record }],
            text: "why".to_owned(),
        };
        let mut bytes = Vec::new();
        reply.write(&mut bytes).unwrap();
        assert_eq!(Reply::read(&mut bytes.as_slice()).unwrap(), reply);
    }
}
