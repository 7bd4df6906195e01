//! A stream of frames with anything in it: no panic, and what is understood is what was sent.

use nvshare_wire::{AgentMessage, ClientMessage, HEADER_LEN, Header, MAX_PAYLOAD, MessageError};

/// Decodes a payload; what is understood must encode to the same bytes.
fn understand(from_agent: bool, kind: u16, payload: &[u8]) -> Result<u64, MessageError> {
    let encoded = if from_agent {
        AgentMessage::decode(kind, payload)?.encode()
    } else {
        ClientMessage::decode(kind, payload)?.encode()
    };
    assert_eq!(&encoded.as_bytes()[HEADER_LEN..], payload, "another message than was sent");
    Ok(u64::from(kind))
}

#[test]
fn fuzz_frames() {
    let words: &[&[u8]] = &[b"NVSH\x01\0", b"\x01\0", b"\x88\0\0\0", &[0; 16], &[0xff; 16]];
    nvshare_fuzz::fuzz(env!("CARGO_MANIFEST_DIR"), "frames", words, |input| {
        let (from_agent, mut rest) =
            input.split_first().map_or((false, &[][..]), |(by, rest)| (by & 1 == 1, rest));
        // Which side, which messages before the end, and what ended the stream.
        let mut understood = u64::from(from_agent);
        while let Some((header, after)) = rest.split_first_chunk::<HEADER_LEN>() {
            let header = match Header::decode(header) {
                Ok(header) => header,
                Err(error) => return nvshare_fuzz::outcome(&error.to_string()),
            };
            assert!(header.len as usize <= MAX_PAYLOAD);
            let Some((payload, after)) = after.split_at_checked(header.len as usize) else { return 2 };
            rest = after;
            match understand(from_agent, header.kind, payload) {
                Ok(kind) => understood |= 4 << kind,
                // A session goes on after a message of an unknown kind only.
                Err(MessageError::UnknownKind(_)) => understood |= 1 << 20,
                Err(error) => {
                    return nvshare_fuzz::outcome(&format!(
                        "{from_agent} {} {error}",
                        ["", "a", "b", "c", "d", "e", "f", "g"][usize::from(header.kind) % 8]
                    ));
                }
            }
        }
        understood
    });
}
