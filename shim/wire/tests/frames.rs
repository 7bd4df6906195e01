//! What goes onto the wire comes off it, and nothing else does.
#![expect(clippy::unwrap_used, reason = "a failure of the harness fails the test")]

use std::fmt::Debug;

use nvshare_wire::{
    AgentMessage, ClientMessage, Direction, DrainOutcome, Encoded, FRAME_MAX, FrameError, HEADER_LEN, Header,
    Label, MAGIC, MAX_PAYLOAD, MessageError, Mover, RefusalCode, VERSION,
};

const GPU: [u8; 16] = [0xa5, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0x5a];

fn client_messages() -> Vec<ClientMessage> {
    let mut messages = vec![
        ClientMessage::Hello {
            weight_milli: 250,
            priority: -3,
            memory_limit: u64::MAX,
            name: Label::new("train.py"),
        },
        ClientMessage::Hello { weight_milli: 0, priority: i32::MIN, memory_limit: 0, name: Label::new("") },
        ClientMessage::UseGpu { slot: u32::MAX, gpu: GPU },
        ClientMessage::UvmDescriptor,
        ClientMessage::Waiting { gpu: GPU, threads: 7 },
        ClientMessage::Resumed { gpu: GPU, epoch: 1, moved: 2, moved_ns: u64::MAX },
        ClientMessage::Yield { gpu: GPU, epoch: u64::MAX },
    ];
    for direction in [Direction::In, Direction::Out] {
        messages.push(ClientMessage::Moved { gpu: GPU, epoch: 7, direction, moved: 8, moved_ns: 9 });
    }
    for by in [Mover::Demand, Mover::Plain, Mover::Protected, Mover::Unproven] {
        messages.push(ClientMessage::Moves { by });
    }
    for outcome in [DrainOutcome::Drained, DrainOutcome::TimedOut, DrainOutcome::Capturing] {
        messages.push(ClientMessage::Revoked { gpu: GPU, epoch: 9, outcome, drain_ns: 10, moved: 11 });
    }
    messages
}

fn agent_messages() -> Vec<AgentMessage> {
    let mut messages = vec![
        AgentMessage::Welcome { client: u64::MAX, silence_ms: 5000 },
        AgentMessage::Grant { gpu: GPU, epoch: 3, prefetch: 1 << 40 },
        AgentMessage::Revoke { gpu: GPU, epoch: 4, drain_ms: 1000, shortfall: 5 },
        AgentMessage::Alive,
        AgentMessage::Room { gpu: GPU, unevictable: 7 << 30, host: u64::MAX },
        AgentMessage::Limit { bytes: 3 << 30 },
        AgentMessage::Displaced { gpu: GPU, brought: 0, pushed: 1 },
    ];
    for code in [
        RefusalCode::Version,
        RefusalCode::Malformed,
        RefusalCode::Order,
        RefusalCode::Descriptor,
        RefusalCode::Limit,
        RefusalCode::Timeout,
    ] {
        messages.push(AgentMessage::Refused { code, detail: Label::new("why — for people") });
    }
    messages
}

fn split(frame: &Encoded) -> (Header, &[u8]) {
    let (header, payload) = frame.as_bytes().split_first_chunk::<HEADER_LEN>().unwrap();
    let header = Header::decode(header).unwrap();
    assert_eq!(header.len as usize, payload.len());
    assert!(payload.len() <= MAX_PAYLOAD && frame.as_bytes().len() <= FRAME_MAX);
    (header, payload)
}

/// A frame decodes to what it was made from, and no shorter or longer payload decodes at all.
fn check<M: PartialEq + Debug>(
    message: &M,
    frame: &Encoded,
    decode: impl Fn(u16, &[u8]) -> Result<M, MessageError>,
) {
    let (header, payload) = split(frame);
    assert_eq!(decode(header.kind, payload).as_ref(), Ok(message));
    for len in 0..payload.len() {
        assert_eq!(
            decode(header.kind, &payload[..len]),
            Err(MessageError::Short),
            "{message:?} cut at {len}"
        );
    }
    let mut longer = payload.to_vec();
    longer.push(0);
    assert_eq!(decode(header.kind, &longer), Err(MessageError::TrailingBytes(1)), "{message:?}");
}

#[test]
fn every_message_makes_the_round_trip_and_no_cut_of_it_does() {
    for message in client_messages() {
        check(&message, &message.encode(), ClientMessage::decode);
    }
    for message in agent_messages() {
        check(&message, &message.encode(), AgentMessage::decode);
    }
}

#[test]
fn exactly_the_messages_with_a_descriptor_say_so() {
    for message in client_messages() {
        let expected = matches!(message, ClientMessage::Hello { .. } | ClientMessage::UvmDescriptor);
        assert_eq!(message.carries_descriptor(), expected, "{message:?}");
    }
}

#[test]
fn kinds_that_nobody_sends_are_unknown_and_no_other_error() {
    for kind in [0, 10, 1000, u16::MAX] {
        assert_eq!(ClientMessage::decode(kind, &[1, 2, 3]), Err(MessageError::UnknownKind(kind)));
    }
    for kind in [0, 9, 1000, u16::MAX] {
        assert_eq!(AgentMessage::decode(kind, &[]), Err(MessageError::UnknownKind(kind)));
    }
}

#[test]
fn values_without_meaning_are_refused() {
    let revoked =
        ClientMessage::Revoked { gpu: GPU, epoch: 1, outcome: DrainOutcome::Drained, drain_ns: 0, moved: 0 };
    let frame = revoked.encode();
    let (header, payload) = split(&frame);
    let mut payload = payload.to_vec();
    payload[24..28].copy_from_slice(&3u32.to_le_bytes());
    assert_eq!(ClientMessage::decode(header.kind, &payload), Err(MessageError::Value("outcome", 3)));

    let frame = AgentMessage::Refused { code: RefusalCode::Limit, detail: Label::new("") }.encode();
    let (header, payload) = split(&frame);
    for code in [0u16, 7, u16::MAX] {
        let mut payload = payload.to_vec();
        payload[..2].copy_from_slice(&code.to_le_bytes());
        assert_eq!(
            AgentMessage::decode(header.kind, &payload),
            Err(MessageError::Value("code", code.into()))
        );
    }
}

#[test]
fn a_header_with_anything_wrong_is_refused_for_that_reason() {
    let good = Header { kind: 3, len: MAX_PAYLOAD as u32 }.encode();
    assert_eq!(Header::decode(&good), Ok(Header { kind: 3, len: MAX_PAYLOAD as u32 }));
    let with = |at: usize, value: &[u8]| {
        let mut bytes = good;
        bytes[at..at + value.len()].copy_from_slice(value);
        Header::decode(&bytes)
    };
    assert_eq!(with(0, &(MAGIC + 1).to_le_bytes()), Err(FrameError::Magic(MAGIC + 1)));
    assert_eq!(with(4, &(VERSION + 1).to_le_bytes()), Err(FrameError::Version(VERSION + 1)));
    let long = MAX_PAYLOAD as u32 + 1;
    assert_eq!(with(8, &long.to_le_bytes()), Err(FrameError::Length(long)));
    assert_eq!(with(12, &1u32.to_le_bytes()), Err(FrameError::Reserved(1)));
}

#[test]
fn a_label_is_cut_at_a_character_and_holds_no_control_characters() {
    assert_eq!(Label::new("a\nb\0c").as_str(), "a?b?c");
    let long = "ü".repeat(100);
    let label = Label::new(&long);
    assert_eq!(label.as_str(), "ü".repeat(64));
    let odd = format!("x{long}");
    assert_eq!(Label::new(&odd).as_str(), format!("x{}", "ü".repeat(63)));
}

#[test]
fn a_label_from_the_wire_is_clean_text_or_refused() {
    let frame =
        ClientMessage::Hello { weight_milli: 1, priority: 0, memory_limit: 0, name: Label::new("ab") }
            .encode();
    let (header, payload) = split(&frame);
    let with = |bytes: &[u8]| {
        let mut payload = payload.to_vec();
        payload[16..16 + bytes.len()].copy_from_slice(bytes);
        ClientMessage::decode(header.kind, &payload)
    };
    assert!(with(b"abc\0").is_ok());
    for bad in [&b"a\xff\0"[..], b"a\x1b[0m\0", b"a\0b\0", b"\0\0\x01"] {
        assert_eq!(with(bad), Err(MessageError::Text), "{bad:?}");
    }
}

#[test]
fn random_bytes_never_panic_and_what_they_decode_to_encodes_back_to_them() {
    let seed = 0x6e76_7368_6172_6521_u64;
    println!("seed {seed:#x}");
    let mut state = seed;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let frames: Vec<Encoded> = (client_messages().iter().map(ClientMessage::encode))
        .chain(agent_messages().iter().map(AgentMessage::encode))
        .collect();
    let mut decoded = 0;
    for round in 0..200_000 {
        let mut bytes: Vec<u8> = if round % 2 == 0 {
            (0..next() % 80).map(|_| next() as u8).collect()
        } else {
            // Nearly valid: a payload with one bit turned.
            let (_, payload) = split(&frames[next() as usize % frames.len()]);
            let mut bytes = payload.to_vec();
            if !bytes.is_empty() {
                let at = next() as usize % bytes.len();
                bytes[at] ^= 1 << (next() % 8);
            }
            bytes
        };
        let kind = (next() % 10) as u16;
        if let Ok(message) = ClientMessage::decode(kind, &bytes) {
            assert_eq!(split(&message.encode()).1, bytes, "{message:?}");
            decoded += 1;
        }
        if let Ok(message) = AgentMessage::decode(kind, &bytes) {
            assert_eq!(split(&message.encode()).1, bytes, "{message:?}");
            decoded += 1;
        }
        bytes.resize(HEADER_LEN, 0);
        if let Ok(header) = Header::decode(&bytes.try_into().unwrap()) {
            assert!(header.len as usize <= MAX_PAYLOAD);
        }
    }
    assert!(decoded > 1_000, "only {decoded} messages were understood: the test says little");
}
