//! Guest writes: what lands in the overlay is what QEMU would have put there, snapshots and backing
//! files stay what they were, and what was flushed survives.

mod crash;
mod device;
mod emptied;
mod kinds;
mod mounted;
mod stress;

use std::sync::Arc;

use rebasefs::chain::{Chain, Opener};
use rebasefs::file::Access;
use rebasefs::layer::GuestOffset;
use rebasefs::layer::qcow2::testing::{Live, Writer};

use crate::scratch::Scratch;

/// An image of a [`Scratch`] that is written as a mount writes it, without the mount.
struct Guest {
    chain: Chain,
    live: Arc<Live>,
}

/// What a guest does.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// Fills a range with this byte.
    Write(u8),
    /// Zeros that keep their place.
    Zero,
    /// Zeros that give it back.
    Punch,
}

impl Guest {
    fn open(scratch: &Scratch, image: &str) -> Self {
        let chain = Opener::new().chain(&scratch.path(image), None, Access::ReadWrite).unwrap();
        let live = Live::open(chain.top().unwrap().as_qcow2().unwrap()).unwrap();
        let live = Arc::new(live);
        Self { chain: chain.below(0).under(live.clone()), live }
    }

    fn writer(&self) -> &Writer {
        self.live.writer()
    }

    fn act(&self, act: Act, at: u64, length: u64) {
        let (view, at) = (&self.chain, GuestOffset(at));
        let done = match act {
            Act::Write(byte) => self.writer().guest().write(view, at, &vec![byte; length as usize]),
            Act::Zero => self.writer().guest().zero(view, at, length, false),
            Act::Punch => self.writer().guest().zero(view, at, length, true),
        };
        done.unwrap();
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.chain.virtual_size() as usize];
        self.chain.read_at(GuestOffset(0), &mut bytes).unwrap();
        bytes
    }
}

impl Act {
    /// The same in the words of qemu-io.
    fn command(self, at: u64, length: u64) -> String {
        match self {
            Self::Write(byte) => format!("write -q -P {byte} {at} {length}"),
            Self::Zero => format!("write -q -z {at} {length}"),
            Self::Punch => format!("write -q -z -u {at} {length}"),
        }
    }
}
