// Small parts of the panel that are words: pins, and what there is to know about the page.

import { button, element } from "./dom.js";
import { pinColour } from "./frames.js";
import { placeText } from "./numbers.js";

/** The pins of a view as buttons that ask again, each with one that lets it go. */
export function pinList(root, view) {
  const { state, sight } = view;
  const items = state.pins.map((token, nth) => {
    const place = view.asking.locate(token);
    const text = placeText(place, place.frame, sight);
    const jump = button(text, () => view.set({ token }), { "aria-pressed": String(token === state.token) });
    jump.style.setProperty("--colour", pinColour(nth));
    const drop = button("×", () => view.pick({ token, panel: sight.askingPanel(state.direction, 0) }),
      { "aria-label": `let go ${text}` });
    return element("li", {}, jump, drop);
  });
  root.replaceChildren(...(items.length ? [element("ul", {}, ...items)] : []));
}

export function aboutFold({ title, model, sites, omitted = [] }) {
  const exact = sites.map(({ name, difference, dtype }) => {
    const apart = difference === undefined
      ? "the weights as they were kept"
      : `${dtype}; rows lie at most ${Number(difference).toExponential(1)} from the model's`;
    return element("li", {}, element("bdi", {}, name), ` – ${apart}`);
  });
  const left = omitted.map(({ name, reason }) =>
    element("li", {}, element("bdi", {}, name), ` – ${reason}`));
  return element("details", { class: "about" }, element("summary", {}, "About this page"),
    element("p", {}, element("bdi", {}, model ?? title)),
    element("p", {}, "Queries and keys are in this page; the softmax over all keys is computed here, exactly."),
    element("ul", {}, ...exact),
    ...(left.length ? [element("p", {}, "Left out:"), element("ul", {}, ...left)] : []));
}
