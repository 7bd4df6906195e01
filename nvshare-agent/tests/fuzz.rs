//! Whatever comes from outside as text or bytes: no panic, an error that says something, the same answer twice.

use std::{io::Write as _, os::unix::net::UnixStream, path::Path, sync::Arc};

use nvshare_agent::{clients::connection::Connection, config::Config, operator::protocol::Request};
use nvshare_core::{
    Activity, Bytes, ClientId, Config as EngineConfig, Drain, Engine, Epoch, GpuId, GpuSample, Input, JobId,
    ModeOrder, Nanos, Order, Poll,
};
use nvshare_fuzz::{fuzz, outcome};

const HERE: &str = env!("CARGO_MANIFEST_DIR");

#[test]
fn fuzz_configuration() {
    let words: &[&[u8]] = &[
        b"[engine]\n",
        b"[listen]\n",
        b"[driver]\n",
        b"[sensors]\n",
        b"[gpu]\n",
        b"overhead = ",
        b"quantum_max = ",
        b"\"30 s\"",
        b"\"1 GiB\"",
        b"max_clients = ",
        b"metrics = ",
        b"\"off\"",
        b"uvm-kprobe = true\n",
        b"'''",
        b"\xc3",
    ];
    fuzz(HERE, "configuration", words, |input| {
        let text = String::from_utf8_lossy(input);
        match Config::parse(Path::new("fuzz.toml"), &text) {
            Ok(config) => {
                assert!(config.listen.max_clients > 0);
                let core = config.engine.to_core();
                assert!((1..=900).contains(&core.overhead_milli), "{core:?}");
                outcome("accepted")
            }
            Err(error) => {
                let error = error.to_string();
                assert!(error.starts_with("fuzz.toml:"), "no place in {error}");
                outcome(error.split_once(": ").unwrap().1)
            }
        }
    });
}

#[test]
fn fuzz_control_requests() {
    let words: &[&[u8]] = &[
        b"{\"request\":",
        b"\"set_mode\"",
        b"\"mode\":\"auto\"",
        b"\"gpu\":",
        b"\"set_quantum\"",
        b"\"quantum\":",
        b"null",
        b"\"events\"",
        b"\"since_ms\":",
        b"[[[[[[[[",
        b"\\u0000",
        b"1e999",
    ];
    fuzz(HERE, "control", words, |input| {
        let text = String::from_utf8_lossy(input);
        match Request::parse(&text) {
            Ok(request) => outcome(&format!("{request:?}")),
            Err(error) => {
                assert!(!error.is_empty());
                outcome(&error)
            }
        }
    });
}

#[test]
fn fuzz_a_clients_stream() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let words: &[&[u8]] = &[b"NVSH\x01\0", b"\x01\0", b"\x88\0\0\0", &[0; 16]];
    fuzz(HERE, "stream", words, |input| {
        let (mut client, agent) = UnixStream::pair().unwrap();
        client.set_nonblocking(true).unwrap();
        agent.set_nonblocking(true).unwrap();
        runtime.block_on(async {
            let agent = Arc::new(tokio::net::UnixStream::from_std(agent).unwrap());
            let mut connection = Connection::new(agent);
            client.write_all(input).unwrap();
            drop(client);
            let mut frames = 0;
            loop {
                match connection.next().await {
                    Ok(Some(frame)) => {
                        frames += 1;
                        assert!(frames * nvshare_wire::HEADER_LEN <= input.len(), "frames out of nothing");
                        if let Err(error) = frame.message {
                            return outcome(&error.to_string());
                        }
                    }
                    Ok(None) => return 1,
                    Err(error) => return outcome(&error.to_string()),
                }
            }
        })
    });
}

/// Reads numbers off the input; zeros at its end.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().map_or((0, &[][..]), |(first, rest)| (*first, rest));
        self.0 = rest;
        first
    }

    /// Mostly small, sometimes as large as a number gets.
    fn number(&mut self) -> u64 {
        let byte = self.byte();
        match byte {
            0..=127 => byte.into(),
            128..=191 => u64::from(byte & 63) << (self.byte() % 58),
            _ => u64::MAX - u64::from(byte & 63),
        }
    }
}

/// One thing that a client, an operator or the clock may do. Claims are what the agent lets through: cut to its bounds.
fn deed(reader: &mut Reader<'_>) -> Input {
    let client = ClientId(u64::from(reader.byte() % 6));
    let gpu = GpuId([reader.byte() % 3; 16]);
    let epoch = Epoch(reader.number());
    let claim = |reader: &mut Reader<'_>| Bytes(reader.number().min(1 << 46));
    match reader.byte() % 12 {
        0 => Input::ClientJoined {
            client,
            job: JobId(client.0),
            weight_milli: reader.number().clamp(1, 1000) as u32,
            priority: -(reader.byte() as i32),
        },
        1 => Input::ClientUses { client, gpu },
        2 => Input::ClientLeft { client },
        3 => Input::Gpu { gpu, capacity: claim(reader), link_rate: claim(reader) },
        4 => Input::GpuGone { gpu },
        5 => Input::Revoked {
            client,
            gpu,
            epoch,
            drain: [Drain::Done { took: Nanos(reader.number()) }, Drain::TimedOut, Drain::Capturing]
                [usize::from(reader.byte() % 3)],
            moved: Bytes(reader.number()),
        },
        6 => {
            Input::Resumed { client, gpu, epoch, moved: Bytes(reader.number()), took: Nanos(reader.number()) }
        }
        7 => Input::Yielded { client, gpu, epoch },
        8 => Input::Order(Order::Mode {
            gpu: reader.byte().is_multiple_of(2).then_some(gpu),
            mode: [ModeOrder::Auto, ModeOrder::Shared, ModeOrder::Exclusive][usize::from(reader.byte() % 3)],
        }),
        9 => Input::Order(Order::Quantum { quantum: Some(Nanos::millis(10 + reader.number() % 1000)) }),
        10 => {
            Input::Sample { gpu, sample: GpuSample { interval: Nanos::millis(100), ..GpuSample::default() } }
        }
        _ => Input::Activity {
            client,
            gpu,
            activity: Activity {
                managed: claim(reader),
                device: claim(reader),
                calls: reader.number() / 2,
                waiting: reader.number().min(1 << 16) as u32,
                busy_threads: reader.number().min(1 << 16) as u32,
                idle_for: Nanos(reader.number()),
            },
        },
    }
}

#[test]
fn fuzz_what_clients_make_the_engine_do() {
    fuzz(HERE, "engine", &[&[0, 0, 0, 3, 200], &[1, 0, 0, 0], &[1, 0, 0, 1], &[0, 0, 0, 8, 0, 2]], |input| {
        let mut reader = Reader(input);
        let mut engine = Engine::new(EngineConfig::default());
        let (mut now, mut seen) = (Nanos::SECOND, 0);
        while !reader.0.is_empty() {
            now += Nanos::millis(reader.number() % 10_000);
            engine.handle(now, deed(&mut reader));
            let mut outputs = 0;
            loop {
                match engine.poll() {
                    Poll::Emit(output) => {
                        outputs += 1;
                        assert!(outputs < 1000, "decisions without end");
                        seen |= 1 << (outcome(&format!("{output:?}")[..5]) % 8);
                    }
                    Poll::Wait(Some(at)) => break assert!(at > now, "a deadline in the past"),
                    Poll::Wait(None) => break,
                }
            }
            let view = engine.view(now);
            seen |= view
                .gpus
                .iter()
                .fold(0, |seen, gpu| seen | 1 << (8 + gpu.mode as u32) | (gpu.clients.len() as u64) << 12);
        }
        seen
    });
}
