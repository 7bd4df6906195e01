//! The Kubernetes device plugin: offers shares of each GPU as `nvshare.com/gpu` and tells the kubelet what a
//! container needs to be a client of the agent.
//!
//! Problem: the kubelet hands out whole devices by opaque names, and knows nothing of memory that is shared.
//!
//! Approach: each GPU is offered as several devices ([`share`]). [`inventory`] hears from the agent which GPUs there
//! are and how full they are; [`stock`] turns that into devices and their health; [`placement`] advises which to
//! take, and [`injection`] says what goes into the container. [`service`] speaks the interface ([`api`]), and
//! [`kubelet`] keeps it registered through restarts of the kubelet.
//!
//! Invariants: the plugin needs no privilege beyond writing to the kubelet's directory. It holds no state that a
//! restart would lose: what is given away, the kubelet knows. Placement and injection are pure.

pub mod api;
pub mod injection;
pub mod inventory;
pub mod kubelet;
pub mod placement;
pub mod service;
pub mod share;
pub mod stock;
