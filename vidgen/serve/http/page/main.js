// The page put together.

import { call, videos } from "./api.js";
import { byId, complain, settle } from "./dom.js";
import { Facts } from "./facts.js";
import { Form, FormError } from "./form.js";
import { Library } from "./library.js";
import { forget, ongoing, remembered } from "./records.js";
import { Stage } from "./stage.js";

const form = new Form();
const facts = new Facts((id) => library.nameOf(id));
const stage = new Stage(facts, () => library.refresh());
const library = new Library(
  (record) => stage.watch(record),
  (record) => stage.update(record),
);

byId("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  settle("form");
  try {
    const request = form.read();
    if (form.isLive) {
      offerNothing();
      stage.startLive(request);
      return;
    }
    byId("submit").disabled = true;
    const record = await videos.create(request);
    await stage.watch(record, request.segments);
    await library.refresh();
  } catch (error) {
    const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
    complain(`${error.message}${wait}`, "form");
    if (error instanceof FormError) error.focus();
  } finally {
    byId("submit").disabled = false;
  }
});

/** After a reload: the session that this tab was in may still run, for its grace. */
async function offerToRejoin() {
  const id = remembered();
  if (!id) return;
  const record = await videos.get(id).catch(() => null);
  if (!ongoing(record)) {
    forget();
    return;
  }
  byId("rejoin-prompt").textContent = `“${record.prompt}”`;
  byId("rejoin").hidden = false;
  byId("rejoin-yes").onclick = () => {
    offerNothing();
    stage.watch(record);
  };
  byId("rejoin-stop").onclick = async () => {
    offerNothing();
    forget();
    await videos.cancel(id).catch((error) => complain(error.message, "general"));
    library.refresh();
  };
  byId("rejoin-yes").focus();
}

function offerNothing() {
  byId("rejoin").hidden = true;
}

async function loadModels() {
  try {
    form.models = (await call("GET", "v1/models")).data;
  } catch (error) {
    complain(error.message, "server");
  }
}

loadModels();
offerToRejoin();

/** For tests and for measuring by hand. */
window.vidgen = { quality: () => stage.quality() };
