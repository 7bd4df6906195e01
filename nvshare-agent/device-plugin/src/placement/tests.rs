use proptest::prelude::*;

use super::*;

const SHARES: u32 = 4;

fn gpu(number: u8) -> GpuId {
    GpuId([number; 16])
}

/// Free shares: how many of each GPU.
fn wish(free: &[u32], size: usize) -> Wish {
    let available = free
        .iter()
        .enumerate()
        .flat_map(|(index, &free)| (0..free).map(move |number| Share { gpu: gpu(index as u8), number }))
        .collect();
    Wish { available, must_include: BTreeSet::new(), size }
}

fn gpus(
    wish: &Wish,
    placement: Placement,
    several: Several,
    advice: impl Fn(GpuId) -> Advice,
) -> Vec<(u8, usize)> {
    let mut found: BTreeMap<u8, usize> = BTreeMap::new();
    for share in choose(wish, SHARES, placement, several, advice).expect("a choice") {
        *found.entry(share.gpu.0[0]).or_default() += 1;
    }
    found.into_iter().collect()
}

fn none(_: GpuId) -> Advice {
    Advice::default()
}

#[test]
fn spread_takes_the_emptiest_gpu_and_pack_the_fullest_with_room() {
    let wish = wish(&[2, 4, 1, 0], 1);
    assert_eq!(gpus(&wish, Placement::Spread, Several::Apart, none), [(1, 1)]);
    assert_eq!(gpus(&wish, Placement::Pack, Several::Apart, none), [(2, 1)]);
}

#[test]
fn a_container_with_several_shares_gets_as_many_gpus_or_one() {
    let wish = wish(&[3, 4, 2], 3);
    assert_eq!(gpus(&wish, Placement::Spread, Several::Apart, none), [(0, 1), (1, 1), (2, 1)]);
    assert_eq!(gpus(&wish, Placement::Spread, Several::Together, none), [(1, 3)]);
    assert_eq!(gpus(&wish, Placement::Pack, Several::Together, none), [(0, 3)]);
}

#[test]
fn a_gpu_in_trouble_is_taken_last_and_a_fuller_one_later() {
    let advice =
        |id| Advice { thrashing: id == gpu(0), committed_milli: if id == gpu(1) { 900 } else { 100 } };
    for placement in [Placement::Spread, Placement::Pack] {
        let chosen = gpus(&wish(&[4, 4, 4], 2), placement, Several::Apart, advice);
        assert_eq!(chosen, [(1, 1), (2, 1)], "{placement:?}");
        let chosen = gpus(&wish(&[4, 4, 4], 1), placement, Several::Apart, advice);
        assert_eq!(chosen, [(2, 1)], "{placement:?}");
    }
}

#[test]
fn what_a_container_must_have_counts_as_its_own() {
    let mut wish = wish(&[4, 4], 2);
    wish.must_include.insert(Share { gpu: gpu(1), number: 2 });
    assert_eq!(gpus(&wish, Placement::Spread, Several::Apart, none), [(0, 1), (1, 1)]);
    assert_eq!(gpus(&wish, Placement::Spread, Several::Together, none), [(1, 2)]);
}

#[test]
fn impossible_wishes_are_refused_with_the_reason() {
    let choose = |wish: &Wish| choose(wish, SHARES, Placement::Spread, Several::Apart, none);
    assert_eq!(choose(&wish(&[1, 1], 3)), Err(ImpossibleWish::TooMany { size: 3, available: 2 }));
    let absent = Share { gpu: gpu(9), number: 0 };
    let mut one = wish(&[1, 1], 1);
    one.must_include.insert(absent);
    assert_eq!(choose(&one), Err(ImpossibleWish::NotAvailable(absent)));
    one.size = 0;
    assert_eq!(choose(&one), Err(ImpossibleWish::TooFew { must: 1, size: 0 }));
}

proptest! {
    #[test]
    fn a_choice_has_the_size_and_what_it_must_have_and_nothing_that_is_taken(
        free in prop::collection::vec(0..=SHARES, 1..6),
        picks in prop::collection::vec(any::<prop::sample::Index>(), 0..4),
        size in 0_usize..12,
        pack: bool,
        together: bool,
        milli in prop::collection::vec(0_u64..2000, 6),
    ) {
        let mut wish = wish(&free, size);
        let all: Vec<Share> = wish.available.iter().copied().collect();
        if !all.is_empty() {
            wish.must_include = picks.iter().map(|pick| *pick.get(&all)).take(size).collect();
        }
        let placement = if pack { Placement::Pack } else { Placement::Spread };
        let several = if together { Several::Together } else { Several::Apart };
        let advice = |id: GpuId| Advice { thrashing: milli[0] > 1000, committed_milli: milli[id.0[0] as usize] };
        let chosen = choose(&wish, SHARES, placement, several, advice);
        if size > all.len() {
            prop_assert!(chosen.is_err());
        } else {
            let chosen = chosen.expect("a possible wish");
            prop_assert_eq!(chosen.len(), size);
            prop_assert!(chosen.is_subset(&wish.available) && chosen.is_superset(&wish.must_include));
            let different: BTreeSet<GpuId> = chosen.iter().map(|share| share.gpu).collect();
            let with_room = free.iter().filter(|&&free| free > 0).count();
            if !together && wish.must_include.is_empty() {
                prop_assert_eq!(different.len(), size.min(with_room));
            }
            if together && wish.must_include.is_empty() && free.iter().any(|&free| free as usize >= size) {
                prop_assert!(different.len() <= 1);
            }
        }
    }
}
