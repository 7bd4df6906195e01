//! Clients: sessions over `clients.sock`, and what is known of each client.
//!
//! **Problem.** Anybody on the machine may connect, and a client may be stopped, killed, wrong or hostile.
//!
//! **Approach.** One task per connection ([`session`]) owns the framing ([`connection`]) and turns messages into
//! facts for the engine. What others need of a client ([`client::Client`]) is in the [`registry::Registry`].
//!
//! **Invariants.** Who a client is comes from the kernel. A client that ends, by whatever way, is forgotten at
//! once, together with everything that kept its memory alive. No client makes another one wait: what is sent to
//! it goes through a bounded queue, what it sends is taken at a bounded rate, and so are connections ([`admission`]).

pub mod admission;
pub mod cgroup;
pub mod client;
pub mod connection;
pub mod identity;
pub mod listener;
pub mod outbox;
pub mod registry;
pub mod session;
