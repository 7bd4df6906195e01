//! One block of ours, piece by piece: what is known of where each 2 MiB of it lie.
//!
//! Runs of equal pieces are kept as one span, so a block that was never written in part costs one entry, and one that
//! was costs at most an entry for each 2 MiB.

use std::ops::Range;

/// The unit in which unified memory moves.
pub(crate) const PIECE: u64 = 2 << 20;
/// The unit in which memory is protected and asked for.
const PAGE: u64 = 4096;

/// What is known of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Nothing. It may never have been touched, so to move it could be to make it.
    Unknown,
    /// It holds data, on the GPU or in host memory.
    Somewhere,
    /// It is on the GPU.
    In,
    /// It is in host memory.
    Out,
    /// It is on its way.
    Moving,
}

/// Equal pieces in a row, up to the next span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    end: u32,
    place: Place,
    touched: u64,
}

/// A managed block that was made for the program's device memory.
#[derive(Debug)]
pub(crate) struct Extent {
    pub(super) base: u64,
    pub(super) bytes: u64,
    pub(super) slot: usize,
    pub(super) context: usize,
    /// In order, without a gap; neighbours differ.
    spans: Vec<Span>,
}

impl Extent {
    pub(super) fn new(
        base: u64,
        bytes: u64,
        slot: usize,
        context: usize,
        place: Place,
        touched: u64,
    ) -> Self {
        let end = ((base + bytes).div_ceil(PIECE) - base / PIECE) as u32;
        Self { base, bytes, slot, context, spans: vec![Span { end, place, touched }] }
    }

    pub(super) fn end(&self) -> u64 {
        self.base + self.bytes
    }

    /// (place, last touch, pieces) of each span.
    pub(super) fn spans(&self) -> impl Iterator<Item = (Place, u64, Range<u32>)> {
        let begins = std::iter::once(0).chain(self.spans.iter().map(|span| span.end));
        begins.zip(&self.spans).map(|(begin, span)| (span.place, span.touched, begin..span.end))
    }

    /// The whole pages of these pieces that are this block's alone: address and length.
    pub(super) fn pages(&self, pieces: &Range<u32>) -> (u64, u64) {
        let at = |piece: u32| (self.base / PIECE + u64::from(piece)) * PIECE;
        let begin = at(pieces.start).max(self.base).next_multiple_of(PAGE);
        let end = at(pieces.end).min(self.end()) / PAGE * PAGE;
        (begin, end.saturating_sub(begin))
    }

    /// All its whole pages.
    pub(super) fn all_pages(&self) -> (u64, u64) {
        self.pages(&(0..self.spans.last().map_or(0, |span| span.end)))
    }

    /// The pieces that lie in `[address, address + bytes)` with every byte that is this block's.
    pub(super) fn within(&self, address: u64, bytes: u64) -> Range<u32> {
        let end = address.saturating_add(bytes);
        let piece = |at: u64| (at / PIECE - self.base / PIECE) as u32;
        let first = if address <= self.base { 0 } else { piece(address.next_multiple_of(PIECE)) };
        let last = if end >= self.end() {
            piece(self.end().next_multiple_of(PIECE))
        } else {
            piece(end.max(self.base))
        };
        first..last.max(first)
    }

    /// Changes what is known of some pieces.
    pub(super) fn paint(&mut self, pieces: &Range<u32>, change: impl Fn(Place, u64) -> (Place, u64)) {
        if pieces.is_empty() {
            return;
        }
        let mut painted: Vec<Span> = Vec::with_capacity(self.spans.len() + 2);
        let mut push = |end: u32, (place, touched): (Place, u64)| match painted.last_mut() {
            Some(last) if last.end >= end => {}
            Some(last) if (last.place, last.touched) == (place, touched) => last.end = end,
            Some(_) | None => painted.push(Span { end, place, touched }),
        };
        for span in &self.spans {
            let now = (span.place, span.touched);
            if pieces.start > 0 {
                push(span.end.min(pieces.start), now);
            }
            if span.end > pieces.start {
                push(span.end.min(pieces.end), change(now.0, now.1));
            }
            push(span.end, now);
        }
        self.spans = painted;
    }

    /// The same for all pieces.
    pub(super) fn paint_all(&mut self, change: impl Fn(Place, u64) -> (Place, u64)) {
        let end = self.spans.last().map_or(0, |span| span.end);
        self.paint(&(0..end), change);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(base: u64, bytes: u64) -> Extent {
        Extent::new(base, bytes, 0, 0, Place::Unknown, 0)
    }

    fn places(extent: &Extent) -> Vec<(Place, Range<u32>)> {
        extent.spans().map(|(place, _, pieces)| (place, pieces)).collect()
    }

    #[test]
    fn a_block_that_begins_and_ends_within_pieces_has_them_in_part_and_moves_whole_pages_only() {
        let extent = extent(PIECE / 2 + 512, 2 * PIECE);
        assert_eq!(places(&extent), [(Place::Unknown, 0..3)]);
        assert_eq!(extent.pages(&(0..1)), (PIECE / 2 + PAGE, PIECE / 2 - PAGE));
        assert_eq!(extent.pages(&(1..2)), (PIECE, PIECE));
        assert_eq!(extent.pages(&(2..3)), (2 * PIECE, PIECE / 2));
        assert_eq!(extent.all_pages(), (PIECE / 2 + PAGE, 2 * PIECE - PAGE));
    }

    #[test]
    fn only_pieces_that_are_written_whole_count_as_written() {
        let extent = extent(4 * PIECE, 3 * PIECE + 100);
        let at = 4 * PIECE;
        assert_eq!(extent.within(at, 3 * PIECE + 100), 0..4);
        assert_eq!(extent.within(0, u64::MAX), 0..4);
        assert_eq!(extent.within(at, 3 * PIECE + 99), 0..3);
        assert_eq!(extent.within(at + 1, 3 * PIECE + 99), 1..4);
        assert!(extent.within(at + 1, PIECE).is_empty());
        assert_eq!(extent.within(at + PIECE, PIECE), 1..2);
    }

    #[test]
    fn spans_split_where_they_must_and_join_where_they_can() {
        let mut extent = extent(0, 8 * PIECE);
        extent.paint(&(2..4), |_, _| (Place::In, 7));
        assert_eq!(places(&extent), [(Place::Unknown, 0..2), (Place::In, 2..4), (Place::Unknown, 4..8)]);
        extent.paint(&(4..8), |_, _| (Place::In, 7));
        assert_eq!(places(&extent), [(Place::Unknown, 0..2), (Place::In, 2..8)]);
        extent.paint(
            &(0..8),
            |place, touched| {
                if place == Place::In { (Place::Out, touched) } else { (place, touched) }
            },
        );
        assert_eq!(places(&extent), [(Place::Unknown, 0..2), (Place::Out, 2..8)]);
        extent.paint_all(|_, _| (Place::Unknown, 0));
        assert_eq!(places(&extent), [(Place::Unknown, 0..8)]);
    }

    #[test]
    fn painting_in_any_order_gives_what_painting_each_piece_gives() {
        const PIECES: u32 = 40;
        let seed = u64::from(std::process::id());
        println!("seed {seed}");
        let mut random = seed | 1;
        let mut next = |below: u32| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random >> 33) as u32 % below
        };
        let mut extent = extent(PIECE, u64::from(PIECES) * PIECE);
        let mut each = vec![(Place::Unknown, 0_u64); PIECES as usize];
        for _ in 0..2000 {
            let from = next(PIECES);
            let to = from + next(PIECES - from + 1);
            let place = [Place::In, Place::Out, Place::Somewhere][next(3) as usize];
            let touched = u64::from(next(3));
            extent.paint(&(from..to), |_, _| (place, touched));
            each[from as usize..to as usize].fill((place, touched));
            let spelled: Vec<_> = extent
                .spans()
                .flat_map(|(place, touched, pieces)| pieces.map(move |_| (place, touched)))
                .collect();
            assert_eq!(spelled, each);
            assert!(
                extent
                    .spans
                    .windows(2)
                    .all(|pair| (pair[0].place, pair[0].touched) != (pair[1].place, pair[1].touched))
            );
        }
    }
}
