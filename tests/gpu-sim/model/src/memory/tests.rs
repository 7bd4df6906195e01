use super::*;

const CARD: CardId = CardId(0);
const FAULT: MakeResidentCause = MakeResidentCause::ReplayableFault;

/// A card of `chunks` and one process for each entry of `blocks`, with that many managed blocks.
fn host(chunks: u64, blocks: &[u64]) -> (Memory, Vec<(SpaceId, BlockSpan)>) {
    let mut memory = Memory::new(&[chunks * BLOCK_BYTES], 1 << 16);
    let spaces = blocks
        .iter()
        .map(|&count| {
            let space = memory.create_space();
            let span = memory.register(space, 0x7000_0000_0000, count * BLOCK_BYTES).unwrap();
            (space, span)
        })
        .collect();
    (memory, spaces)
}

/// Touches blocks in order; returns (faults, bytes in, bytes out).
fn touch(memory: &mut Memory, blocks: impl Iterator<Item = BlockId>) -> (u64, u64, u64) {
    let (mut faults, mut bytes_in, mut bytes_out) = (0, 0, 0);
    for block in blocks {
        if memory.place(block) == Place::Card(CARD) {
            continue;
        }
        faults += 1;
        for effect in memory.bring_to_card(block, CARD, FAULT) {
            match effect {
                Effect::Moved { to: Some(_), bytes, .. } => bytes_in += bytes,
                Effect::Moved { to: None, bytes, .. } => bytes_out += bytes,
                Effect::Populated { .. } => {}
            }
        }
    }
    (faults, bytes_in, bytes_out)
}

#[test]
fn the_first_touch_moves_no_bytes() {
    let (mut memory, spaces) = host(8, &[8]);
    assert_eq!(touch(&mut memory, spaces[0].1.iter()), (8, 0, 0));
}

#[test]
fn two_that_fit_never_evict() {
    let (mut memory, spaces) = host(16, &[8, 8]);
    for round in 0..5 {
        for (_, span) in &spaces {
            let faults = if round == 0 { 8 } else { 0 };
            assert_eq!(touch(&mut memory, span.iter()), (faults, 0, 0));
        }
    }
}

#[test]
fn a_cyclic_sweep_over_more_than_the_card_faults_on_every_block_each_time() {
    let (mut memory, spaces) = host(16, &[18]);
    touch(&mut memory, spaces[0].1.iter());
    for _ in 0..3 {
        assert_eq!(touch(&mut memory, spaces[0].1.iter()), (18, 18 * BLOCK_BYTES, 18 * BLOCK_BYTES));
    }
}

#[test]
fn the_victim_is_the_block_that_became_resident_first_however_recently_it_was_used() {
    let (mut memory, spaces) = host(4, &[4, 1]);
    let (a, b) = (spaces[0].1, spaces[1].1);
    touch(&mut memory, a.iter());
    // Using the oldest block again does not fault, and so does not save it.
    touch(&mut memory, a.iter().take(1));
    let effects = memory.bring_to_card(b.first, CARD, FAULT);
    assert!(
        matches!(effects[0], Effect::Moved { block, space, cause: MakeResidentCause::Eviction, first_on_host: true, .. }
            if block == a.first && space == spaces[0].0),
        "{effects:?}"
    );
    assert!(matches!(effects[1], Effect::Populated { block, .. } if block == b.first));
}

#[test]
fn a_block_that_was_pushed_out_comes_back_with_exactly_its_bytes() {
    let mut memory = Memory::new(&[4 * BLOCK_BYTES], 64);
    let space = memory.create_space();
    // Neither end is aligned: three blocks, the outer ones partial.
    let base = 0x7000_0000_0000 + BLOCK_BYTES - 0x3000;
    let span = memory.register(space, base, BLOCK_BYTES + 0x8000).unwrap();
    assert_eq!(span.count, 3);
    touch(&mut memory, span.iter());
    for block in span.iter() {
        memory.bring_to_host(block, MakeResidentCause::ApiMigrate);
    }
    assert_eq!(touch(&mut memory, span.iter()), (3, BLOCK_BYTES + 0x8000, 0));
}

#[test]
fn plain_memory_evicts_managed_memory_and_fails_only_against_plain_memory() {
    let (mut memory, spaces) = host(8, &[8, 1]);
    touch(&mut memory, spaces[0].1.iter());
    let newcomer = spaces[1].0;
    let effects = memory.allocate_plain(newcomer, CARD, 3 * BLOCK_BYTES).unwrap();
    let victims: Vec<_> = effects
        .iter()
        .map(|effect| match effect {
            Effect::Moved { block, cause: MakeResidentCause::Eviction, .. } => *block,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(victims, spaces[0].1.iter().take(3).collect::<Vec<_>>());
    assert_eq!(
        memory.allocate_plain(newcomer, CARD, 6 * BLOCK_BYTES),
        Err(MemoryError::OutOfMemory { wanted: 6 * BLOCK_BYTES, free: 5 * BLOCK_BYTES })
    );
}

#[test]
fn small_plain_allocations_of_one_process_share_a_chunk() {
    let (mut memory, spaces) = host(8, &[1]);
    for _ in 0..100 {
        memory.allocate_plain(spaces[0].0, CARD, 4096).unwrap();
    }
    assert_eq!(memory.usage(CARD).plain, BLOCK_BYTES);
}

#[test]
fn pushing_out_does_not_lower_what_the_driver_calls_used_but_freeing_does() {
    let (mut memory, spaces) = host(8, &[4]);
    touch(&mut memory, spaces[0].1.iter());
    for block in spaces[0].1.iter() {
        memory.bring_to_host(block, MakeResidentCause::ApiMigrate);
    }
    assert_eq!((memory.usage(CARD).managed, memory.usage(CARD).kept), (0, 4 * BLOCK_BYTES));
    memory.unregister(spaces[0].0, 0x7000_0000_0000, 4 * BLOCK_BYTES).unwrap();
    assert_eq!((memory.usage(CARD).managed, memory.usage(CARD).kept), (0, 0));
}

#[test]
fn the_death_of_a_process_frees_all_it_held() {
    let (mut memory, spaces) = host(8, &[4, 4]);
    touch(&mut memory, spaces[0].1.iter());
    memory.allocate_plain(spaces[0].0, CARD, 4 * BLOCK_BYTES).unwrap();
    memory.destroy_space(spaces[0].0);
    assert_eq!(memory.usage(CARD), Usage { total: 8 * BLOCK_BYTES, plain: 0, managed: 0, kept: 0 });
    assert_eq!(touch(&mut memory, spaces[1].1.iter()), (4, 0, 0));
}

#[test]
fn between_two_cards_the_bytes_go_through_the_host() {
    let mut memory = Memory::new(&[4 * BLOCK_BYTES; 2], 64);
    let space = memory.create_space();
    let span = memory.register(space, 0, BLOCK_BYTES).unwrap();
    memory.bring_to_card(span.first, CardId(0), FAULT);
    let legs: Vec<_> = memory
        .bring_to_card(span.first, CardId(1), FAULT)
        .iter()
        .map(|effect| match effect {
            Effect::Moved { from, to, .. } => (*from, *to),
            other @ Effect::Populated { .. } => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(legs, [(Some(CardId(0)), None), (None, Some(CardId(1)))]);
    assert_eq!(memory.usage(CardId(0)).managed, 0);
}

#[test]
fn ranges_that_overlap_are_refused() {
    let (mut memory, spaces) = host(8, &[4]);
    let overlap = memory.register(spaces[0].0, 0x7000_0000_0000 + BLOCK_BYTES, BLOCK_BYTES);
    assert!(matches!(overlap, Err(MemoryError::BadRange { .. })), "{overlap:?}");
    assert!(memory.register(spaces[0].0, 0x7000_0000_0000 + 4 * BLOCK_BYTES, 4096).is_ok());
    for (base, len) in [(0, 0), (0, 1), (1, 4096), (u64::MAX - 4095, 8192)] {
        assert!(memory.register(spaces[0].0, base, len).is_err(), "{base:#x}+{len:#x}");
    }
}

/// Random operations keep every chunk accounted for, and the whole card is free once all are gone.
#[test]
fn chunks_always_add_up() {
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    println!("seed {seed}");
    let mut state = seed | 1;
    let mut random = |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let (mut memory, spaces) = host(16, &[12, 12, 12]);
    for _ in 0..5_000 {
        let (space, span) = spaces[random(3) as usize];
        let block = BlockId(span.first.0 + random(12) as u32);
        match random(5) {
            0 | 1 => drop(memory.bring_to_card(block, CARD, FAULT)),
            2 => drop(memory.bring_to_host(block, MakeResidentCause::ApiMigrate)),
            3 => drop(memory.allocate_plain(space, CARD, random(3 * BLOCK_BYTES))),
            _ => memory.free_plain(space, CARD, random(4 * BLOCK_BYTES)),
        }
        let Usage { total, plain, managed, kept } = memory.usage(CARD);
        assert!(plain + managed + kept <= total, "{plain} + {managed} + {kept} > {total}");
        let resident: u64 = spaces.iter().map(|(space, _)| memory.resident_of(*space, CARD)).sum();
        assert_eq!(resident, managed);
    }
    for (space, _) in spaces {
        memory.destroy_space(space);
    }
    assert_eq!(memory.usage(CARD), Usage { total: 16 * BLOCK_BYTES, plain: 0, managed: 0, kept: 0 });
}
