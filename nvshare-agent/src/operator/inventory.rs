//! `/gpus.json`: what a device plugin needs to know, and nothing about clients.

use nvshare_core::{Inventory, InventoryGpu};

use super::report::Desk;
use crate::{
    driver::Gone,
    observe::{gpus::Gpus, source::SensorName},
};

/// The GPUs as they are now.
pub async fn take(desk: &Desk) -> Result<Inventory, Gone> {
    let seen = desk.hub.driver.seen().await?;
    let known = desk.hub.gpus.all();
    let listed = |sensor| {
        desk.sensors.all().iter().any(|status| status.sensor == sensor && status.state.is_attached())
    };
    let gpus = seen
        .view
        .gpus
        .iter()
        .map(|view| {
            let name = known.get(&view.gpu).and_then(|gpu| gpu.nvml.as_ref()).map(|nvml| nvml.name.clone());
            let capacity = (!Gpus::is_unknown(view.capacity)).then_some(view.capacity);
            InventoryGpu::new(view, name, capacity)
        })
        .collect();
    Ok(Inventory { complete: listed(SensorName::Nvml), gpus })
}
