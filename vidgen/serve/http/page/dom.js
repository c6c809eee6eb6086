// Small words for the page's elements and for how numbers read.

export const byId = (id) => document.getElementById(id);

/** A new element; `on...` properties become listeners, `data` goes to dataset, null children are left out. */
export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (name === "data") Object.assign(node.dataset, value);
    else if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** 0:04.5 */
export function clock(seconds) {
  const tenths = Math.max(0, Math.round((seconds || 0) * 10));
  const whole = Math.floor(tenths / 10);
  const pad = String(whole % 60).padStart(2, "0");
  return `${Math.floor(whole / 60)}:${pad}.${tenths % 10}`;
}

/** "12 s", "3 min 20 s", "2 h 5 min" */
export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

export function plural(count, word) {
  return `${count} ${word}${count === 1 ? "" : "s"}`;
}

/** A share of a container, which no style sheet can know beforehand. */
export function setShare(node, start, width) {
  node.style.setProperty("--start", `${(100 * start).toFixed(3)}%`);
  node.style.setProperty("--width", `${(100 * Math.max(0, width)).toFixed(3)}%`);
}

/** Changes the text only when it differs: screen readers speak at every change of a live region. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function say(text) {
  setText(byId("status"), text);
}

/** One line that stays until it is closed, or until the next one about the same thing. */
export function complain(text, about = "general") {
  const box = byId("errors");
  box.querySelector(`[data-about="${about}"]`)?.remove();
  const close = element("button", { type: "button", class: "icon small", "aria-label": "Close this message" }, "×");
  const line = element("p", { data: { about } }, element("span", {}, text), close);
  close.addEventListener("click", () => line.remove());
  box.append(line);
}

export function settle(about) {
  byId("errors").querySelector(`[data-about="${about}"]`)?.remove();
}
