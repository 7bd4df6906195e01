//! Every kind of bad input on the client socket: a clear refusal, counted, and nobody else notices.

use std::{io::Write as _, net::Shutdown, os::fd::AsFd as _};

use nvshare_wire::{AgentMessage, ClientMessage, HEADER_LEN, RefusalCode, page::PAGE_LEN};
use rustix::fs::SealFlags;

use crate::{
    client::{GPU, ScriptedClient, connect, hello, memfd, receive, send_with},
    process::{Agent, wait_for},
};

/// Runs `bad` beside a healthy client and expects that the agent answers with this refusal, counts it, closes the
/// connection, and that the healthy client notices nothing.
fn refused(
    code: RefusalCode,
    label: &str,
    said: &str,
    bad: impl FnOnce(&Agent) -> std::os::unix::net::UnixStream,
) {
    let agent = Agent::start();
    let healthy = ScriptedClient::working(&agent);
    let before = agent.refused(label);
    let stream = bad(&agent);
    let refusal = loop {
        match receive(&stream) {
            Some(AgentMessage::Welcome { .. }) => {}
            other => break other,
        }
    };
    match refusal {
        Some(AgentMessage::Refused { code: given, detail }) => {
            assert_eq!(given, code, "{detail:?}");
            assert!(detail.as_str().contains(said), "{detail:?} does not say {said:?}");
        }
        other => panic!("expected a refusal, got {other:?}"),
    }
    assert_eq!(receive(&stream), None, "the connection must be closed");
    assert_eq!(agent.refused(label) - before, 1.0);
    wait_for("the bad client to be forgotten", || (agent.clients().len() == 1).then_some(()));
    healthy.noticed_nothing(&agent);
}

#[test]
fn another_protocol_is_refused() {
    refused(RefusalCode::Malformed, "malformed", "not an nvshare frame", |agent| {
        let mut stream = connect(agent);
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        stream
    });
}

#[test]
fn another_protocol_version_is_refused_as_such() {
    refused(RefusalCode::Version, "version", "version 99", |agent| {
        let mut stream = connect(agent);
        let mut frame = hello().encode().as_bytes().to_vec();
        frame[4] = 99;
        stream.write_all(&frame).unwrap();
        stream
    });
}

#[test]
fn a_length_of_one_gibibyte_is_refused_at_the_header() {
    refused(RefusalCode::Malformed, "malformed", "1073741824 bytes", |agent| {
        let mut stream = connect(agent);
        let mut frame = hello().encode().as_bytes()[..HEADER_LEN].to_vec();
        frame[8..12].copy_from_slice(&(1_u32 << 30).to_le_bytes());
        stream.write_all(&frame).unwrap();
        stream
    });
}

#[test]
fn a_frame_that_is_cut_by_the_end_of_the_stream_is_refused() {
    refused(RefusalCode::Malformed, "malformed", "inside a frame", |agent| {
        let mut stream = connect(agent);
        stream.write_all(&hello().encode().as_bytes()[..40]).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        stream
    });
}

#[test]
fn a_payload_that_is_too_short_for_its_message_is_refused() {
    refused(RefusalCode::Malformed, "malformed", "cut short", |agent| {
        let client = ScriptedClient::join(agent);
        let mut frame = ClientMessage::UseGpu { slot: 0, gpu: GPU }.encode().as_bytes().to_vec();
        frame.truncate(HEADER_LEN + 7);
        frame[8..12].copy_from_slice(&7_u32.to_le_bytes());
        let mut stream = client.stream().try_clone().unwrap();
        stream.write_all(&frame).unwrap();
        stream
    });
}

#[test]
fn a_message_before_hello_is_refused() {
    refused(RefusalCode::Order, "order", "must be Hello", |agent| {
        let mut stream = connect(agent);
        stream.write_all(ClientMessage::UseGpu { slot: 0, gpu: GPU }.encode().as_bytes()).unwrap();
        stream
    });
}

#[test]
fn a_second_hello_is_refused() {
    refused(RefusalCode::Order, "order", "second Hello", |agent| {
        let client = ScriptedClient::join(agent);
        let page = memfd(PAGE_LEN as u64, SealFlags::SHRINK);
        send_with(client.stream(), hello().encode().as_bytes(), &[page.as_fd()]);
        client.stream().try_clone().unwrap()
    });
}

#[test]
fn a_gpu_that_was_not_announced_is_refused() {
    refused(RefusalCode::Order, "order", "not announced", |agent| {
        let client = ScriptedClient::join(agent);
        client.say(&ClientMessage::Yield { gpu: [9; 16], epoch: 1 });
        client.stream().try_clone().unwrap()
    });
}

#[test]
fn a_slot_outside_the_page_is_refused() {
    refused(RefusalCode::Limit, "limit", "slot 4000000000", |agent| {
        let client = ScriptedClient::join(agent);
        client.say(&ClientMessage::UseGpu { slot: 4_000_000_000, gpu: GPU });
        client.stream().try_clone().unwrap()
    });
}

#[test]
fn hello_without_its_page_is_refused() {
    refused(RefusalCode::Descriptor, "descriptor", "without the descriptor", |agent| {
        let mut stream = connect(agent);
        stream.write_all(hello().encode().as_bytes()).unwrap();
        stream
    });
}

#[test]
fn a_page_that_could_shrink_under_the_agent_is_refused() {
    refused(RefusalCode::Descriptor, "descriptor", "sealed", |agent| {
        let stream = connect(agent);
        let page = memfd(PAGE_LEN as u64, SealFlags::GROW);
        send_with(&stream, hello().encode().as_bytes(), &[page.as_fd()]);
        stream
    });
}

#[test]
fn a_page_of_the_wrong_size_or_kind_is_refused() {
    refused(RefusalCode::Descriptor, "descriptor", "4096 bytes", |agent| {
        let stream = connect(agent);
        let page = memfd(100, SealFlags::SHRINK);
        send_with(&stream, hello().encode().as_bytes(), &[page.as_fd()]);
        stream
    });
    refused(RefusalCode::Descriptor, "descriptor", "page", |agent| {
        let stream = connect(agent);
        let device = std::fs::File::open("/dev/zero").unwrap();
        send_with(&stream, hello().encode().as_bytes(), &[device.as_fd()]);
        stream
    });
}

#[test]
fn a_page_of_another_layout_is_refused() {
    refused(RefusalCode::Descriptor, "descriptor", "layout", |agent| {
        let stream = connect(agent);
        let page = memfd(PAGE_LEN as u64, SealFlags::SHRINK);
        send_with(&stream, hello().encode().as_bytes(), &[page.as_fd()]);
        stream
    });
}

#[test]
fn a_client_that_connects_and_says_nothing_is_sent_away() {
    refused(RefusalCode::Timeout, "timeout", "Hello", connect);
}

#[test]
fn a_client_that_stops_inside_a_frame_is_sent_away() {
    refused(RefusalCode::Timeout, "timeout", "not finished", |agent| {
        let client = ScriptedClient::join(agent);
        let mut stream = client.stream().try_clone().unwrap();
        stream.write_all(&hello().encode().as_bytes()[..20]).unwrap();
        stream
    });
}

#[test]
fn an_unknown_message_is_counted_and_skipped() {
    let agent = Agent::start();
    let healthy = ScriptedClient::working(&agent);
    let client = ScriptedClient::join(&agent);
    let mut frame = ClientMessage::UseGpu { slot: 0, gpu: GPU }.encode().as_bytes().to_vec();
    frame[6..8].copy_from_slice(&999_u16.to_le_bytes());
    client.stream().try_clone().unwrap().write_all(&frame).unwrap();
    // The same session goes on.
    client.say(&ClientMessage::UseGpu { slot: 0, gpu: GPU });
    wait_for("the session to go on", || {
        let clients = agent.clients();
        let known = clients.iter().find(|known| known["client"] == client.id)?;
        (known["gpus"].as_array()?.len() == 1).then_some(())
    });
    assert_eq!(agent.metric("nvshare_client_unknown_messages_total"), 1.0);
    healthy.noticed_nothing(&agent);
}

#[test]
fn a_descriptor_that_is_not_of_the_driver_is_closed_and_counted() {
    let agent = Agent::start();
    let healthy = ScriptedClient::working(&agent);
    let client = ScriptedClient::working(&agent);
    let file = std::fs::File::open("/dev/null").unwrap();
    send_with(client.stream(), ClientMessage::UvmDescriptor.encode().as_bytes(), &[file.as_fd()]);
    wait_for("the rejection", || {
        (agent.metric("nvshare_client_rejected_descriptors_total") == 1.0).then_some(())
    });
    healthy.noticed_nothing(&agent);
    client.noticed_nothing(&agent);
}

#[test]
fn descriptors_that_nobody_asked_for_are_closed_and_counted() {
    let agent = Agent::start();
    let healthy = ScriptedClient::working(&agent);
    let client = ScriptedClient::join(&agent);
    let file = std::fs::File::open("/dev/null").unwrap();
    let frame = ClientMessage::UseGpu { slot: 0, gpu: GPU }.encode();
    send_with(client.stream(), frame.as_bytes(), &[file.as_fd(), file.as_fd()]);
    wait_for("the count", || (agent.metric("nvshare_client_extra_descriptors_total") == 2.0).then_some(()));
    healthy.noticed_nothing(&agent);
}

#[test]
fn a_frame_that_comes_byte_by_byte_is_understood() {
    let agent = Agent::start();
    let client = ScriptedClient::join(&agent);
    let mut stream = client.stream().try_clone().unwrap();
    let frame = ClientMessage::UseGpu { slot: 0, gpu: GPU }.encode();
    for byte in frame.as_bytes() {
        stream.write_all(&[*byte]).unwrap();
    }
    wait_for("the message to arrive", || (agent.clients()[0]["gpus"].as_array()?.len() == 1).then_some(()));
}

#[test]
fn hostile_claims_in_the_page_stay_claims() {
    use std::sync::atomic::Ordering::Relaxed;
    let agent = Agent::start();
    let healthy = ScriptedClient::working(&agent);
    let hostile = ScriptedClient::working(&agent);
    let gpu = hostile.page.gpu();
    for figure in [&gpu.managed, &gpu.device, &gpu.calls, &gpu.active_ns] {
        figure.store(u64::MAX, Relaxed);
    }
    for figure in [&gpu.inside, &gpu.waiting, &gpu.syncing, &gpu.contexts] {
        figure.store(u32::MAX, Relaxed);
    }
    wait_for("the claim to be read", || {
        let clients = agent.clients();
        let seen = clients.iter().find(|client| client["client"] == hostile.id)?;
        (seen["managed_bytes"] == 1_u64 << 46).then_some(())
    });
    // The engine has taken bins with these figures and still answers.
    wait_for("more bins", || (agent.metric("nvshare_sampler_seconds_count") > 5.0).then_some(()));
    assert!(agent.http("/healthz").0.contains("200"));
    healthy.noticed_nothing(&agent);
}
